"""LoFT, arXiv 2505.21289: W = W0 + U Vᵀ, one factor per step, moved as AdamW would move W.

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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.recipe import Hyper, Rule, SiteState, Tensors
from loralab.training.adamw import adamw_step, check_moments, per_slot


@dataclass(frozen=True)
class LoFT(Rule):
    """Alternating projected AdamW for a pair; other tensors of the Form take plain AdamW.

    Args:
        eps: AdamW's ϵ; 1e-4 in the authors' code.
        damping_a, damping_b: ε on A Aᵀ and on BᵀB.
        alternate: move B at odd steps and A at even ones; False moves both at every step.
        as_coded: carry P by R P Rᵀ as the authors' code does (see `_carry`).
    """

    pair_only: ClassVar[bool] = True
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    inverts: ClassVar[bool] = True
    memory_axes: ClassVar[dict[str, tuple[int, ...]]] = {"v.A": (-2, -1), "v.B": (-2, -1)}

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-4
    damping_a: float = 1e-8
    damping_b: float = 1e-6
    alternate: bool = True
    as_coded: bool = False

    def __post_init__(self) -> None:
        check_moments(self)

    def step(self, sites: Sequence[SiteState], hyper: Hyper) -> None:
        others = [part for site in sites if (part := _without_pair(site)).t]
        if others:
            adamw_step(self, others, hyper, self.beta1, self.beta2, self.eps)
        for site in sites:
            self._step_pair(site, hyper)

    def _step_pair(self, site: SiteState, hyper: Hyper) -> None:
        A, B, state = site.t["A"].mT, site.t["B"], site.state
        if "turns" not in state:
            state["turns"] = torch.zeros_like(hyper.lr)
            state["old.A"], state["old.B"] = A.mT.clone(), B.clone()
        state["turns"] += 1
        b_moves = state["turns"] % 2 == 1
        everywhere = torch.ones_like(b_moves)
        a_turn, b_turn = (~b_moves, b_moves) if self.alternate else (everywhere, everywhere)
        old_A, old_B = state["old.A"].mT, state["old.B"]
        # Both halves see the factors as they were when the gradients were taken. (The authors'
        # loop lets the second one see the first one's step.)
        new_B = self._half(
            "B", B, site.g["B"], A, old_A, self.damping_a, b_turn & (hyper.lr > 0), state, hyper
        )
        new_A = self._half(
            "A", A, site.g["A"].mT, B, old_B, self.damping_b, a_turn & (hyper.lr > 0), state, hyper
        )
        state["old.A"].copy_(A.mT)
        state["old.B"].copy_(B)
        site.t["A"].copy_(new_A.mT)
        site.t["B"].copy_(new_B)

    def _half(
        self,
        name: str,
        U: Tensor,
        G: Tensor,
        V: Tensor,
        V_old: Tensor,
        damping: float,
        moves: Tensor,
        state: Tensors,
        hyper: Hyper,
    ) -> Tensor:
        """Remember G [K, p, r] and return U [K, p, r], moved in the slots that `moves`."""
        S, R = _projection(V, V_old, damping)
        g = G @ S
        P = g[..., :, None] * g[..., None, :] * (1 - self.beta2)
        m = g * (1 - self.beta1)
        if "m." + name in state:
            m = m + self.beta1 * _oriented(name, state["m." + name]) @ R
            P = P + self.beta2 * self._carry(state["v." + name], R)
        state["m." + name] = _oriented(name, m).contiguous()
        state["v." + name] = P
        if not bool(moves.any()):
            return U
        turns = state["turns"]
        pairs = (V[..., :, None] * V[..., None, :]).flatten(-2)
        second = (P.flatten(-2) @ pairs.mT).clamp_min(0).sqrt()
        second = second / per_slot((1 - self.beta2**turns).sqrt(), second) + self.eps
        update = (m @ V.mT / second) @ V @ S
        rate = per_slot(hyper.lr / (1 - self.beta1**turns), U)
        decay = per_slot(1 - hyper.lr * hyper.weight_decay, U)
        return torch.where(per_slot(moves, U), U * decay - rate * update, U)

    def _carry(self, P: Tensor, R: Tensor) -> Tensor:
        """Return P [K, p, r, r] in the new basis: rows turn as g̃ R, so P turns as Rᵀ P R.

        The authors' code (tnurbek/loft, optim_helper.py at 2d0557b) has R P Rᵀ, with which the
        full-rank limit is not AdamW.
        """
        R = R[:, None]
        return R @ P @ R.mT if self.as_coded else R.mT @ P @ R


def _projection(V: Tensor, V_old: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return S = (VᵀV + εI)⁻¹ and R = (V₋ᵀV) S, [K, r, r].

    In fp64: with ε = 1e-8 the Gram matrix can be singular to fp32. `cholesky_ex` does not raise, so
    a diverged slot keeps its NaN to itself.
    """
    V64, old = V.double(), V_old.double()
    gram = V64.mT @ V64
    gram.diagonal(dim1=-2, dim2=-1).add_(damping)
    S = torch.cholesky_inverse(torch.linalg.cholesky_ex(gram).L)
    return S.to(V), ((old.mT @ V64) @ S).to(V)


def _oriented(name: str, x: Tensor) -> Tensor:
    """Turn A's memory between its own shape [K, r, n] and the formula's [K, n, r]."""
    return x.mT if name == "A" else x


def _without_pair(site: SiteState) -> SiteState:
    """Return the site with every tensor but A and B; the memory is the site's own."""
    rest = SiteState()
    rest.site, rest.g, rest.state = site.site, site.g, site.state
    rest.t = {name: x for name, x in site.t.items() if name not in ("A", "B")}
    return rest


register("loft", "optimization", __doc__, LoRA(), rule=LoFT())
