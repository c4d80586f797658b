"""DiffoRA, arXiv 2502.08905: dW_ij = s γ_ij B_ij A_ij for module j of layer i, where the selection
matrix Γ = [γ_ij] (the paper's differential adaptation matrix) says which modules are adapted.

Γ is relaxed to [0, 1] and learned on held-out data, then made discrete: in each layer the K modules
with the largest γ are adapted and trained anew, the others are not. Here γ is a sigmoid per module,
K a share of the layer's modules and α's gradient is of first order, all our reading.

:summary: Learns on held-out data which modules of each layer to adapt
:equation: dW = s gamma B A, gamma = sigmoid(alpha) on held-out data, then 0 or 1
:trap: The paper also lets modules share weights after the selection; that is left out.
:trap: Modules compete within their layer, so no layer is left without an update.
:trap: A module that no trial of a pack has chosen keeps a single rank of zeros.
:title: DiffoRA: Enabling Parameter-Efficient Fine-Tuning via Differential Module Selection
:authors: Tangyu Jiang, Haodi Wang, Chun Yuan
:source: arXiv 2502.08905, 2025: our reading of the abstract
:verified: the abstract and second-hand summaries; the text and code could not be had
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import SomeShare
from loralab.methods import register
from loralab.methods.budgeting._search import Search, Searching, TwoLevel, anew
from loralab.methods.expansion.lora import plain_pair
from loralab.recipe import Evidence, Recipe, Site, SiteState, Tensors


@dataclass(frozen=True)
class SelectedModule(Searching):
    """LoRA's pair times one number: sigmoid(alpha) while searching, then 1."""

    rank_axis: ClassVar[dict[str, int]] = {"A": -2, "B": -1}

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return LoRA's A and B, alpha [1] = 0 (γ = 1/2) and searching [1] = 1."""
        zero = evidence.weight.new_zeros(1)
        return plain_pair(site, evidence) | {"alpha": zero, "searching": torch.ones_like(zero)}

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        gamma = t["searching"] * t["alpha"].sigmoid() + 1 - t["searching"]
        return t["B"] * gamma.unsqueeze(-2), t["A"]


@dataclass(frozen=True)
class SelectModules(Search):
    """Adapt the best modules of every layer and start them anew.

    Args:
        share: K in units of a layer's modules; at least one module stays.
    """

    share: SomeShare = 0.5

    def objection(self, recipe: Recipe) -> tuple[str, str] | None:
        if "alpha" not in recipe.form.rank_axis:
            return None
        return "form", "it compares one alpha per layer, and the form has one per rank"

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        if not self.ends(step, n_steps):
            return
        for layer in dict.fromkeys(site.site.layer for site in sites):
            modules = [site for site in sites if site.site.layer == layer]
            alpha = torch.cat([site.t["alpha"] for site in modules], -1)
            count = max(1, round(self.share * len(modules)))
            chosen = torch.zeros_like(alpha).scatter_(-1, alpha.topk(count, -1).indices, 1.0)
            for site, choice in zip(modules, chosen.split(1, -1), strict=True):
                anew(site, choice.expand(-1, site.t["B"].shape[-1]))


RULE = TwoLevel(order="first")
register("diffora", "budgeting", __doc__, SelectedModule(), rule=RULE, schedule=SelectModules())
