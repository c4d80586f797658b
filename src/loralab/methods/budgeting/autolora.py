"""AutoLoRA, arXiv 2403.09113, section 3: dW = s Σ_j α_j b_j a_jᵀ, α ≥ 0 and Σ_j α_j = 1, one weight
per rank-1 part; α follows held-out data, A and B the training data (two levels). Then the parts
with α_j < 1/r are dropped and the rest is trained anew without weights.

The paper differentiates through one step of the lower level; this is the first-order version, as in
the authors' fine-tuning code (ruz048/AutoLoRA, finetune/), which alternates the two steps. α is a
softmax of free numbers.

:summary: Learns a weight per rank on held-out data, drops the small ones, trains the rest
:equation: dW = s B diag(softmax(alpha)) A; keep ranks with softmax(alpha)_j >= 1/r
:trap: While it searches the update is a weighted mean of its parts: 1/r of LoRA's.
:trap: Equal weights are exactly 1/r: a threshold without slack would drop every rank.
:trap: The ranks are only searched; A, B and the optimizer's memory start anew afterwards.
:trap: The paper retrains on training and held-out data together; here the split stays.
:title: AutoLoRA: Automatically Tuning Matrix Ranks in Low-Rank Adaptation Based on Meta Learning
:authors: Ruiyi Zhang, Rushi Qiang, Sai Ashish Somayajula, Pengtao Xie
:source: arXiv 2403.09113, 2024: section 3
:verified: authors' code (ruz048/AutoLoRA, loralib/layers.py and finetune/lora_glue.py)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.budgeting._ranks import in_use, regrow
from loralab.methods.expansion.lora import plain_pair
from loralab.recipe import Evidence, Form, Recipe, Schedule, Site, SiteState, Tensors
from loralab.training.adamw import AdamW


@dataclass(frozen=True)
class WeightedParts(Form):
    """LoRA's pair with a weight per rank: softmax(alpha) while searching, then 1."""

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "alpha", "searching"})
    frozen: ClassVar[frozenset[str]] = frozenset({"searching"})
    rank_axis: ClassVar[dict[str, int]] = {"A": -2, "B": -1, "alpha": -1}

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return LoRA's A and B, alpha [r] = 1 and searching [1] = 1."""
        one = evidence.weight.new_ones(1)
        return plain_pair(site, evidence) | {"alpha": one.repeat(site.rank), "searching": one}

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        weights = t["searching"] * t["alpha"].softmax(-1) + 1 - t["searching"]
        return t["B"] * weights.unsqueeze(-2), t["A"]


@dataclass(frozen=True)
class TwoLevel(AdamW):
    """AdamW; alpha's gradient is of held-out data.

    Args:
        ratio: alpha's learning rate over that of A and B, positive.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"alpha"})
    held_out: ClassVar[frozenset[str]] = frozenset({"alpha"})

    ratio: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ratio > 0:
            raise UserError(f"ratio of AutoLoRA must be positive, not {self.ratio!r}")

    def lr_ratio(self, name: str) -> float:
        return self.ratio if name == "alpha" else 1.0


@dataclass(frozen=True)
class SearchThenTrain(Schedule):
    """Keep the parts that matter, and start them anew.

    Args:
        search: the share of the run that searches, in (0, 1); at least one step.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"alpha", "searching"})
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B", "alpha"})
    changes: ClassVar[frozenset[str]] = frozenset({"searching"})
    resizes: ClassVar[bool] = True

    search: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.search < 1:
            raise UserError(f"search of AutoLoRA lies in (0, 1), it is {self.search!r}")

    def objection(self, recipe: Recipe) -> tuple[str, str] | None:
        if "alpha" in recipe.form.rank_axis:
            return None
        return "form", "it compares the alphas of a layer's ranks, and the form has one per layer"

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        if step + 1 != max(1, round(self.search * n_steps)) or step + 1 == n_steps:
            return
        for site in sites:
            alpha = site.t["alpha"]
            # Equal weights are 1/r each, which rounding may leave just below the threshold.
            anew(site, alpha.softmax(-1) * alpha.shape[-1] >= 1 - 1e-5)
            site.t["alpha"].mul_(site.state["alive"])

    def ranks(self, sites: Sequence[SiteState]) -> list[Tensor] | None:
        return in_use(sites, "B")


def anew(site: SiteState, keep: Tensor) -> None:
    """Go on with the ranks in the mask `keep` [K, r], from a fresh start and without a search."""
    regrow(site, keep)
    alive = site.state.pop("alive")
    site.renew(1)
    site.fixed["searching"].zero_()
    site.t["A"].mul_(alive.unsqueeze(-1))  # a slot with fewer ranks keeps the rest at 0
    for memory in site.state.values():
        memory.zero_()
    site.state["alive"] = alive


register(
    "autolora", "budgeting", __doc__, WeightedParts(), rule=TwoLevel(), schedule=SearchThenTrain()
)
