"""SaLoRA (not on arXiv): dW = s B diag(g) A, whose gates close.

ŝ = σ((log u - log(1-u) + log α) / τ), u ~ U(0, 1), g = min(1, max(0, ŝ (ζ - γ) + γ)); in evaluation
ŝ = σ(log α). The loss gains λ (‖BᵀB - I‖² + ‖A Aᵀ - I‖²). `_gates.py` holds the budget (section
3.3) and removes closed ranks (3.5). γ = -0.1, ζ = 1.1, τ = 1 and log α at the start are
LoRAFactory's, whose later versions are another method; B = 0, λ, `growth` and the steps of β and
log α are ours.

:summary: Random gates on the ranks learn to close under a budget on how many stay open
:equation: dW = s B diag(g) A, g hard concrete; max over b: L + b (mean E|g|_0 - budget)^2
:trap: The rank asked for is the budget, the mean rank that the constraint aims at; training starts
    with 1.5 times it.
:trap: The constraint is on all sites together; one per site would give all the same rank.
:trap: Evaluation uses the gates without noise; training draws new ones at every step.
:title: Structure-Aware Low-Rank Adaptation for Parameter-Efficient Fine-Tuning
:authors: Yahao Hu, Yifei Xie, Tianfeng Wang, Man Chen, Zhisong Pan
:source: Mathematics 11(20), 4317, doi 10.3390/math11204317, 2023: sections 3.2 to 3.5
:verified: the survey arXiv 2601.22708 and LoRAFactory's code; the paper's text was not to be had
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import AtLeastOne, NonNegative
from loralab.methods import register
from loralab.methods.budgeting._gates import GateAdamW, L0Budget, hard_concrete
from loralab.methods.budgeting._svd import off_orthonormal
from loralab.methods.expansion.lora import uniform
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class SaLoRA(Form):
    """LoRA with hard-concrete gates.

    Args:
        growth: ranks at the start, as a multiple of the rank asked for; 2 in ALoRA's comparison.
        orthogonal: λ, weight of the orthogonality term.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "log_alpha"})
    rank_axis: ClassVar[Mapping[str, int]] = {"A": -2, "B": -1, "log_alpha": -1}

    growth: AtLeastOne = 1.5
    orthogonal: NonNegative = 0.1

    def width(self, site: Site) -> int:
        """Return the ranks at the start."""
        return max(site.rank, round(self.growth * site.rank))

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return LoRA's A and B = 0 with more ranks, and log_alpha = 1: a gate is open at 97 %."""
        b = self.width(site)
        return {
            "A": uniform(evidence, "A", b, site.d_in, bound=site.d_in**-0.5),
            "B": evidence.weight.new_zeros(site.d_out, b),
            "log_alpha": evidence.weight.new_ones(b),
        }

    def draw(self, site: Site, n: int, generator: torch.Generator) -> Tensors:
        """Return u; after a removal the first of them are used."""
        return {"u": torch.rand(self.width(site), generator=generator, dtype=torch.float64)}

    def gates(self, t: Tensors) -> Tensor:
        """Return g [*, b]."""
        u = t["u"][..., : t["log_alpha"].shape[-1]] if "u" in t else None
        return hard_concrete(t["log_alpha"], u)

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return t["B"], self.gates(t).unsqueeze(-1) * t["A"]

    def penalty(self, t: Tensors, site: Site) -> Tensor | None:
        return self.orthogonal * (off_orthonormal(t["B"].mT) + off_orthonormal(t["A"]))


register("salora", "budgeting", __doc__, SaLoRA(), rule=GateAdamW(), schedule=L0Budget())
