"""AltLoRA, arXiv 2505.12455, algorithm 1: one factor per step, moved along the full gradient as far
as the other factor lets it, with a momentum that is carried along when that factor moved.

Even steps:  g̃ = (1/s²) (BᵀB)⁻¹ ∇A,  M ← β1 (BᵀB)⁻¹ Bᵀ B₋ M + (1 - β1) g̃,  A ← A - η (M + γ A);
odd steps:   g̃ = (1/s²) ∇B (AAᵀ)⁻¹,  M ← β1 M A₋ Aᵀ (AAᵀ)⁻¹ + (1 - β1) g̃,  B ← B - η (M + γ B),
B₋ and A₋ being the other factor at the last such step. AltLoRA+ (algorithm 2) divides M by √V + ϵ,
V the running mean of g̃².

:summary: Moves A and B in turn along the projected full gradient, momentum carried along
:equation: A <- A - lr M, M <- b1 (B^T B)^-1 B^T B_old M + (1 - b1) (B^T B)^-1 grad A / s^2
:trap: Without the second moment a step is as long as the gradient: learning rates are those of SGD,
    not of Adam.
:trap: A moves first and stands still, since B = 0; B's first step is the second one.
:trap: s enters squared: the learning rate is one of W, whatever alpha.
:title: AltLoRA: Towards Better Gradient Approximation in Low-Rank Adaptation with Alternating
    Projections
:authors: Xin Yu, Yujia Wang, Jinghui Chen, Lingzhou Xue
:source: arXiv 2505.12455, 2025: algorithms 1 and 2, theorems 1 and 2
:verified: the paper's algorithms; damping from the authors' code (LucasXinYu/AltLoRA,
    optimizer_new.py)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.recipe import Hyper, Rule, SiteState
from loralab.training.adamw import adamw_step, check_moments, per_slot
from loralab.training.gram import inverse_gram, others, turned


@dataclass(frozen=True)
class AltLoRA(Rule):
    """Alternating projected momentum for a pair; other tensors take plain AdamW at every step.

    Args:
        second_moment: True for AltLoRA+.
        correct_bias: divide M by 1 - β1^t, as the authors' code does and the paper does not.
        damping: on the Gram matrices (corollary 1); 1e-3 in the authors' code.
    """

    pair_only: ClassVar[bool] = True
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    inverts: ClassVar[bool] = True

    second_moment: bool = False
    correct_bias: bool = False
    damping: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_moments(self)
        if not self.damping > 0:
            raise UserError(f"damping of AltLoRA must be positive, not {self.damping!r}")

    def step(self, sites: Sequence[SiteState], hyper: Hyper) -> None:
        if rest := others(sites):
            adamw_step(self, rest, hyper, self.beta1, self.beta2, self.eps)
        for site in sites:
            if "turns" not in site.state:
                site.state["turns"] = torch.zeros_like(hyper.lr)
            even = site.state["turns"] % 2 == 0
            site.state["turns"] += 1
            for name, turn in (("A", even), ("B", ~even)):
                if bool(turn.any()):
                    self._half(site, name, turn, hyper)

    def _half(self, site: SiteState, name: str, turn: Tensor, hyper: Hyper) -> None:
        """Move one factor, U of U Vᵀ, in the slots whose `turn` it is."""
        state, other = site.state, "B" if name == "A" else "A"
        U, V, g = turned(name, site.t[name]), turned(other, site.t[other]), site.g[name]
        if "m." + name not in state:
            state["m." + name] = torch.zeros_like(site.t[name])
            state["old." + other] = site.t[other].clone()
            if self.second_moment:
                state["v." + name] = torch.zeros_like(site.t[name])
        S = inverse_gram(V, self.damping)
        carry = (turned(other, state["old." + other]).mT.double() @ V.double() @ S).to(U)
        g = (turned(name, g) @ S.to(U)) / per_slot(site.scale.to(U), U) ** 2
        m = self.beta1 * turned(name, state["m." + name]) @ carry + (1 - self.beta1) * g
        now, update = {"m." + name: turned(name, m), "old." + other: site.t[other]}, m
        if self.correct_bias:  # by this factor's own count of steps
            steps = torch.div(state["turns"] + 1, 2, rounding_mode="floor")
            update = m / per_slot(1 - self.beta1**steps, m)
        if self.second_moment:
            v = self.beta2 * turned(name, state["v." + name]) + (1 - self.beta2) * g * g
            now["v." + name], update = turned(name, v), update / (v.sqrt() + self.eps)
        moved = U - per_slot(hyper.lr, U) * (update + per_slot(hyper.weight_decay, U) * U)
        for key, value in now.items():
            state[key].copy_(torch.where(per_slot(turn, value), value, state[key]))
        U.copy_(torch.where(per_slot(turn & (hyper.lr > 0), U), moved, U))


register("altlora", "optimization", __doc__, LoRA(), rule=AltLoRA())
