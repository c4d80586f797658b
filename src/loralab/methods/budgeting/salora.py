"""SaLoRA (Mathematics 2023, 11(20), 4317; not on arXiv): dW = s B diag(g) A, whose gates close.

g ~ hard concrete: ŝ = σ((log u - log(1-u) + log α) / τ), g = min(1, max(0, ŝ (ζ - γ) + γ)) with
u ~ U(0, 1) in training; in evaluation ŝ = σ(log α). Expected L0: R = Σ_i σ(log α_i - τ log(-γ/ζ)).
Budget b by Lagrangian relaxation: min over θ, max over β of L + β (mean R - b)² + λ R_orth,
R_orth = ‖BᵀB - I‖² + ‖A Aᵀ - I‖² (sections 3.2 to 3.4). Ranks whose gate is 0 are removed (3.5).

The text was not to be had: formulas from the survey arXiv 2601.22708; γ, ζ, τ and log α at the
start from LoRAFactory's code; B = 0, λ, `growth` and the steps of β and log α are ours.

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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.budgeting._ranks import alive, due, regrow
from loralab.methods.expansion.lora import uniform
from loralab.recipe import Evidence, Form, Schedule, Site, SiteState, Tensors
from loralab.training.adamw import AdamW

# The hard concrete distribution: its stretch and its temperature.
GAMMA, ZETA, TAU = -0.1, 1.1, 1.0


def open_gates(log_alpha: Tensor) -> Tensor:
    """Return the gates in evaluation, in [0, 1]."""
    return (log_alpha.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


@dataclass(frozen=True)
class SaLoRA(Form):
    """LoRA with hard-concrete gates.

    Args:
        growth: ranks at the start, as a multiple of the rank asked for, which is the budget.
        orthogonal: λ, weight of the orthogonality term.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "log_alpha"})
    rank_axis: ClassVar[Mapping[str, int]] = {"A": -2, "B": -1, "log_alpha": -1}

    growth: float = 1.5
    orthogonal: float = 0.1

    def __post_init__(self) -> None:
        if not self.growth >= 1:
            raise UserError(f"growth of SaLoRA must be at least 1, not {self.growth}")

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
        log_alpha = t["log_alpha"]
        if "u" not in t:
            return open_gates(log_alpha)
        noise = t["u"][..., : log_alpha.shape[-1]].double().logit(1e-6).to(log_alpha.dtype)
        return (((noise + log_alpha) / TAU).sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return t["B"], self.gates(t).unsqueeze(-1) * t["A"]

    def penalty(self, t: Tensors, site: Site) -> Tensor | None:
        one = torch.eye(t["A"].shape[-2], dtype=t["A"].dtype, device=t["A"].device)
        B, A = t["B"].mT @ t["B"] - one, t["A"] @ t["A"].mT - one
        return self.orthogonal * (B.square() + A.square()).sum((-2, -1))


@dataclass(frozen=True)
class GateAdamW(AdamW):
    """AdamW with a learning rate of its own for the gates, which have far to go.

    Args:
        gate_ratio: log α's learning rate as a multiple of the others'.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"log_alpha"})

    gate_ratio: float = 30.0

    def lr_ratio(self, name: str) -> float:
        return self.gate_ratio if name == "log_alpha" else 1.0


@dataclass(frozen=True)
class L0Budget(Schedule):
    """Hold the expected number of open gates of all sites together at the budget.

    Args:
        beta: β at the start.
        beta_lr: step of β's gradient ascent.
        interval: fraction of the run between two removals of closed ranks; 1 removes at the end.
            Earlier ones save time and memory, but a closed gate cannot open again.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"A", "B", "log_alpha"})
    resizes: ClassVar[bool] = True

    beta: float = 1.0
    beta_lr: float = 1.0
    interval: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.interval <= 1:
            raise UserError(f"interval of SaLoRA is a share of the run, not {self.interval}")

    def expected(self, site: SiteState) -> Tensor:
        """Return the probability [K, b] of each gate to be open; 0 for padding."""
        shift = TAU * math.log(-GAMMA / ZETA)
        return (site.t["log_alpha"] - shift).sigmoid() * alive(site, "log_alpha")

    def before_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Add the gradient of β (mean R - b)² by log α, and let β ascend."""
        if "budget" not in sites[0].state:
            n = sum(site.t["log_alpha"].shape[-1] for site in sites)
            one = torch.ones_like(sites[0].t["log_alpha"][:, 0])
            sites[0].state["n"] = n * one
            sites[0].state["budget"] = sum(site.site.rank for site in sites) / n * one
            sites[0].state["beta"] = self.beta * one
        state = sites[0].state
        p = [self.expected(site) for site in sites]
        gap = torch.stack([one.sum(-1) for one in p]).sum(0) / state["n"] - state["budget"]
        slope = (2 * state["beta"] * gap / state["n"])[:, None]
        for site, one in zip(sites, p, strict=True):
            site.g["log_alpha"].add_(slope * one * (1 - one))
        state["beta"].add_(self.beta_lr * gap.square())

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Remove the ranks that are closed in evaluation, when it is time."""
        if not due(step, n_steps, self.interval) and step + 1 < n_steps:
            return
        for site in sites:
            regrow(site, self.open(site))

    def open(self, site: SiteState) -> Tensor:
        """Return the mask [K, b] of ranks that are open in evaluation."""
        return (open_gates(site.t["log_alpha"]) > 0) & alive(site, "log_alpha").bool()

    def ranks(self, sites: Sequence[SiteState]) -> list[Tensor]:
        return [self.open(site).sum(-1) for site in sites]


register("salora", "budgeting", __doc__, SaLoRA(), rule=GateAdamW(), schedule=L0Budget())
