"""AutoLoRA, arXiv 2403.09113, section 4: dW = s Σ_j α_j b_j a_jᵀ, α ≥ 0 and Σ_j α_j = 1, one weight
per rank-1 part; α follows held-out data, A and B the training data (two levels). Then the parts
with α_j < 1/r are dropped and the rest is trained anew without weights.

α's gradient is taken through one plain gradient step of the lower level (in the authors' search,
run_glue_search.py, a step of Adam), or not, as in their lora_glue.py: order="first". α is a softmax
of free numbers.

:summary: Learns a weight per rank on held-out data, drops the small ones, trains the rest
:equation: dW = s B diag(softmax(alpha)) A; keep ranks with softmax(alpha)_j >= 1/r
:trap: A step of the search makes four passes (order="first": two); your own loop calls
    optimizer.step(closure).
:trap: While it searches the update is a weighted mean of its parts: 1/r of LoRA's.
:trap: Equal weights are exactly 1/r: a threshold without slack would drop every rank.
:trap: The ranks are only searched; A, B and the optimizer's memory start anew afterwards.
:trap: The paper retrains on training and held-out data together; here the split stays.
:title: AutoLoRA: Automatically Tuning Matrix Ranks in Low-Rank Adaptation Based on Meta Learning
:authors: Ruiyi Zhang, Rushi Qiang, Sai Ashish Somayajula, Pengtao Xie
:source: arXiv 2403.09113, 2024: section 4, eqs. 2 to 5
:verified: authors' code (ruz048/AutoLoRA: loralib/layers.py, run_glue_search.py,
    finetune/lora_glue.py) and a Korean account of the paper, section by section with its equations;
    the text itself was not to be had
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.methods import register
from loralab.methods.budgeting._search import Search, Searching, TwoLevel, anew
from loralab.methods.expansion.lora import plain_pair
from loralab.recipe import Evidence, Recipe, Site, SiteState, Tensors


@dataclass(frozen=True)
class WeightedParts(Searching):
    """LoRA's pair with a weight per rank: softmax(alpha) while searching, then 1."""

    rank_axis: ClassVar[dict[str, int]] = {"A": -2, "B": -1, "alpha": -1}

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return LoRA's A and B, alpha [r] = 1 and searching [1] = 1."""
        one = evidence.weight.new_ones(1)
        return plain_pair(site, evidence) | {"alpha": one.repeat(site.rank), "searching": one}

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        weights = t["searching"] * t["alpha"].softmax(-1) + 1 - t["searching"]
        return t["B"] * weights.unsqueeze(-2), t["A"]


@dataclass(frozen=True)
class SearchThenTrain(Search):
    """Keep the parts that matter, and start them anew."""

    def objection(self, recipe: Recipe) -> tuple[str, str] | None:
        if "alpha" in recipe.form.rank_axis:
            return None
        return "form", "it compares the alphas of a layer's ranks, and the form has one per layer"

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        if not self.ends(step, n_steps):
            return
        for site in sites:
            alpha = site.t["alpha"]
            # Equal weights are 1/r each, which rounding may leave just below the threshold.
            anew(site, alpha.softmax(-1) * alpha.shape[-1] >= 1 - 1e-5)
            site.t["alpha"].mul_(site.state["alive"])


register(
    "autolora", "budgeting", __doc__, WeightedParts(), rule=TwoLevel(), schedule=SearchThenTrain()
)
