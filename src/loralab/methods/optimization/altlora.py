"""AltLoRA: one factor per step, moved along the full gradient as far as the other factor lets it.

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

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import Positive
from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.methods.optimization import _pairs as pairs
from loralab.recipe import Hyper, SiteState, Tensors
from loralab.training.adamw import per_slot
from loralab.training.gram import turned


@dataclass(frozen=True)
class AltLoRA(pairs.TurnRule):
    """Alternating projected momentum.

    Args:
        second_moment: True for AltLoRA+.
        correct_bias: divide M by 1 - β1^t, as the authors' code does and the paper does not.
        damping: on the Gram matrices (corollary 1); 1e-3 in the authors' code.
    """

    first: ClassVar[str] = "A"  # the paper's even steps

    second_moment: bool = False
    correct_bias: bool = False
    damping: Positive = 1e-3
    eps: Positive = 1e-6

    def memory(self, site: SiteState) -> Tensors:
        seconds = {"v." + n: torch.zeros_like(site.t[n]) for n in pairs.OTHER if self.second_moment}
        return super().memory(site) | seconds

    def half(self, site: SiteState, name: str, hyper: Hyper) -> Tensor:
        turn, (U, g, V) = self.is_turn(site, name), pairs.halves(site, name)
        if not bool(turn.any()):
            return U
        m, V_old = pairs.remembered(site, name)
        S, carry = pairs.seen_through(V, V_old, self.damping)
        g = (g @ S) / per_slot(site.scale.to(U), U) ** 2
        update = self.beta1 * m @ carry + (1 - self.beta1) * g
        pairs.move(m, update, turn)
        pairs.move(V_old, V, turn)
        if self.correct_bias:  # by this factor's own count of steps
            count = torch.div(site.state["turns"] + 1, 2, rounding_mode="floor")
            update = update / per_slot(1 - self.beta1**count, update)
        if self.second_moment:
            v = turned(name, site.state["v." + name])
            pairs.move(v, self.beta2 * v + (1 - self.beta2) * g * g, turn)
            update = update / (v.sqrt() + self.eps)
        return torch.where(per_slot(turn, U), pairs.descended(U, update, hyper), U)


register("altlora", "optimization", __doc__, LoRA(), rule=AltLoRA())
