"""LoFT: moves one factor U of U Vᵀ = B A per step as AdamW moves W; equal at full rank and ε = 0.

With V fixed and S = (VᵀV + εI)⁻¹: g̃ = (∂L/∂U) S is the full gradient seen through V; when V moved
from V₋, R = (V₋ᵀ V) S carries what is remembered:
    m ← β1 m R + (1 - β1) g̃,    P_i ← β2 Rᵀ P_i R + (1 - β2) g̃_iᵀ g̃_i  for each row i [r, r],
    U ← (1 - η λ) U - η [ (m Vᵀ) / (√diag(V P_i Vᵀ) + ϵ) ] V S,  moments bias-corrected.

:summary: Moves one factor at a time as AdamW would move the full weight
:equation: B <- B - lr [AdamW moments of the full gradient, seen through A] A^T (A A^T)^-1
:trap: The second moment needs the r x r cross terms of each row: memory (m + n) r^2.
:trap: Weight decay is lr x decay as in AdamW; the authors' code decays by the bare number.
:trap: The step is in W, so a scale s other than 1 multiplies it; keep alpha = r.
:trap: B moves first: with B = 0 a step of A would do nothing.
:title: LoFT: Low-Rank Adaptation That Behaves Like Full Fine-Tuning
:authors: Nurbek Tastan, Stefanos Laskaridis, Martin Takáč, Karthik Nandakumar, Samuel Horváth
:source: arXiv 2505.21289, 2025: LoFT-AdamW
:verified: authors' code (tnurbek/loft at 2d0557b) bar its clipping, by the norm of g̃ Vᵀ; a note
    (papernotes); the abstract's full-rank claim, by a test; the paper's text was not to be had
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import NonNegative, Positive
from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.methods.optimization import _pairs as pairs
from loralab.methods.optimization._moments import carry_rows, row_memory, row_roots
from loralab.recipe import Hyper, SiteState, Tensors
from loralab.training.adamw import per_slot


@dataclass(frozen=True)
class LoFT(pairs.TurnRule):
    """Alternating projected AdamW.

    Args:
        eps: AdamW's ϵ; 1e-4 in the authors' code.
        damping_a, damping_b: ε on A Aᵀ and on BᵀB.
        alternate: move B at odd steps and A at even ones; False moves both at every step, neither
            seeing the other's move (in the authors' loop the second one does).
        as_coded: carry P by R P Rᵀ as the authors' optim_helper.py does, though rows turn as g̃ R.
    """

    first: ClassVar[str] = "B"
    memory_axes: ClassVar[Mapping[str, tuple[int, ...]]] = {"v.A": (-2, -1), "v.B": (-2, -1)}

    eps: Positive = 1e-4
    damping_a: NonNegative = 1e-8
    damping_b: NonNegative = 1e-6
    alternate: bool = True
    as_coded: bool = False

    def memory(self, site: SiteState) -> Tensors:
        return super().memory(site) | row_memory(site)

    def half(self, site: SiteState, name: str, hyper: Hyper) -> Tensor:
        state, (U, g, V) = site.state, pairs.halves(site, name)
        (m, V_old), P = pairs.remembered(site, name), state["v." + name]
        S, R = pairs.seen_through(V, V_old, self.damping_a if name == "B" else self.damping_b)
        g = g @ S
        m.copy_(self.beta1 * m @ R + (1 - self.beta1) * g)
        carry_rows(P, R.mT if self.as_coded else R, g, self.beta2)
        V_old.copy_(V)
        moves = (self.is_turn(site, name) | (not self.alternate)) & (hyper.lr > 0)
        if not bool(moves.any()):
            return U
        second = row_roots(P, V)  # of W's size, as m Vᵀ is
        second = second / per_slot((1 - self.beta2 ** state["turns"]).sqrt(), second) + self.eps
        update = (m @ V.mT / second) @ V @ S
        rate = per_slot(hyper.lr / (1 - self.beta1 ** state["turns"]), U)
        decay = per_slot(1 - hyper.lr * hyper.weight_decay, U)
        return torch.where(per_slot(moves, U), U * decay - rate * update, U)


register("loft", "optimization", __doc__, LoRA(), rule=LoFT())
