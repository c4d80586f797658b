"""LoFT: W = W0 + U Vᵀ, one factor per step, moved as AdamW would move W.

With V fixed and S = (VᵀV + εI)⁻¹: g̃ = (∂L/∂U) S is the full gradient seen through V; when V moved
from V₋, R = (V₋ᵀ V) S carries what is remembered:
    m ← β1 m R + (1 - β1) g̃,    P_i ← β2 Rᵀ P_i R + (1 - β2) g̃_iᵀ g̃_i  for each row i [r, r],
    U ← (1 - η λ) U - η [ (m Vᵀ) / (√diag(V P_i Vᵀ) + ϵ) ] V S,  moments bias-corrected.
U = B and V = Aᵀ for B; U = Aᵀ and V = B for A. With r = min(m, n) and ε = 0 this is AdamW on W.

:summary: Moves one factor at a time as AdamW would move the full weight
:equation: B <- B - lr [AdamW moments of the full gradient, seen through A] A^T (A A^T)^-1
:trap: The second moment needs the r x r cross terms of each row: memory (m + n) r^2.
:trap: Weight decay is lr x decay as in AdamW; the authors' code decays by the bare number.
:trap: The step is in W, so a scale s other than 1 multiplies it; keep alpha = r.
:trap: B moves first: with B = 0 a step of A would do nothing.
:title: LoFT: Low-Rank Adaptation That Behaves Like Full Fine-Tuning
:authors: Nurbek Tastan, Stefanos Laskaridis, Martin Takáč, Karthik Nandakumar, Samuel Horváth
:source: arXiv 2505.21289, 2025: LoFT-AdamW
:verified: authors' code (tnurbek/loft at 2d0557b) and the abstract's full-rank claim, which a test
    proves; the paper's text could not be read
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import NonNegative, Positive
from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.methods.optimization._pairs import OTHER, PairRule, halves, seen_through
from loralab.recipe import Hyper, SiteState, Tensors
from loralab.training.adamw import per_slot
from loralab.training.gram import turned


@dataclass(frozen=True)
class LoFT(PairRule):
    """Alternating projected AdamW.

    Args:
        eps: AdamW's ϵ; 1e-4 in the authors' code.
        damping_a, damping_b: ε on A Aᵀ and on BᵀB.
        alternate: move B at odd steps and A at even ones; False moves both at every step.
        as_coded: carry P by R P Rᵀ as the authors' code does (optim_helper.py), with which the
            full-rank limit is not AdamW. Rows turn as g̃ R, so P turns as Rᵀ P R.
    """

    memory_axes: ClassVar[Mapping[str, tuple[int, ...]]] = {"v.A": (-2, -1), "v.B": (-2, -1)}

    eps: Positive = 1e-4
    damping_a: NonNegative = 1e-8
    damping_b: NonNegative = 1e-6
    alternate: bool = True
    as_coded: bool = False

    def memory(self, site: SiteState) -> Tensors:
        seconds = {}
        for name in OTHER:
            U = turned(name, site.t[name])
            seconds["v." + name] = U.new_zeros(*U.shape, U.shape[-1])
        return super().memory(site) | seconds

    def step_pair(self, site: SiteState, hyper: Hyper) -> None:
        odd = site.state["turns"] % 2 == 1
        # Both halves see the factors as they were when the gradients were taken. (The authors'
        # loop lets the second one see the first one's step.)
        moved = {n: self._half(site, n, turn, hyper) for n, turn in (("B", odd), ("A", ~odd))}
        for name, U in moved.items():
            site.state["old." + name].copy_(site.t[name])
            turned(name, site.t[name]).copy_(U)

    def _half(self, site: SiteState, name: str, turn: Tensor, hyper: Hyper) -> Tensor:
        """Remember U's gradient and return U, moved in the slots whose `turn` it is."""
        state, (U, g, V) = site.state, halves(site, name)
        m, P = turned(name, state["m." + name]), state["v." + name]
        V_old = turned(OTHER[name], state["old." + OTHER[name]])
        S, R = seen_through(V, V_old, self.damping_a if name == "B" else self.damping_b)
        g = g @ S
        m.copy_(self.beta1 * m @ R + (1 - self.beta1) * g)
        R = R.mT if self.as_coded else R
        carried = R[:, None].mT @ P @ R[:, None]
        P.copy_(self.beta2 * carried + (1 - self.beta2) * g[..., :, None] * g[..., None, :])
        moves = (turn | (not self.alternate)) & (hyper.lr > 0)
        if not bool(moves.any()):
            return U
        pairs = (V[..., :, None] * V[..., None, :]).flatten(-2)
        second = (P.flatten(-2) @ pairs.mT).clamp_min(0).sqrt()  # of W's size, as m Vᵀ is
        second = second / per_slot((1 - self.beta2 ** state["turns"]).sqrt(), second) + self.eps
        update = (m @ V.mT / second) @ V @ S
        rate = per_slot(hyper.lr / (1 - self.beta1 ** state["turns"]), U)
        decay = per_slot(1 - hyper.lr * hyper.weight_decay, U)
        return torch.where(per_slot(moves, U), U * decay - rate * update, U)


register("loft", "optimization", __doc__, LoRA(), rule=LoFT())
