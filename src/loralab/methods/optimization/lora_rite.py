"""LoRA-RITE: adaptive steps of Z = A Bᵀ that are the same whatever the split into A and B.

With polar decompositions A = U_A R_A and B = U_B R_B, for A (and likewise for B):

    ∇̄ = ∇A R_B⁻¹,   P = U_Bᵀ U_B₋,   V ← β2 P V Pᵀ + (1 - β2) ∇̄ᵀ∇̄,   ρ ← β2 (ρ + d(V₋, P V₋ Pᵀ)),
    S = ∇̄ (V + ρ I)^-½,   M ← β1 M Pᵀ + (1 - β1) S,   A ← A - η M R_B^-ᵀ,

with bias-corrected decays; d(X, Y) = min(max_i λ_i(X) - λ_i(Y), tr X - tr Y), at least 0, is what
the change of basis lost. The paper's Z = A Bᵀ is our B A.

:summary: An adaptive optimizer whose step of B A is the same for every split into B and A
:equation: A <- A - lr M R_B^-T, M the momentum of g (V + rho I)^-1/2, g = grad A R_B^-1
:trap: With B = 0 there is no basis to look through: A's first step is 0.
:trap: The paper's best learning rates are some 20 times Adam's.
:trap: Moments live in the other factor's basis and must turn with it.
:title: LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization
:authors: Jui-Nan Yen, Si Si, Zhao Meng, Felix Yu, Sai Surya Duvvuri, Inderjit S. Dhillon, Cho-Jui
    Hsieh, Sanjiv Kumar
:source: arXiv 2410.20625, 2024: algorithm 1
:verified: authors' code (gkevinyen5418/LoRA-RITE at 67fd532, without its clipping), a public digest
    of the paper, and a test of the invariance it proves
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from loralab.bounds import Positive
from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.methods.optimization._pairs import OTHER, PairRule, halves, move, polar
from loralab.recipe import Hyper, SiteState, Tensors
from loralab.training.adamw import per_slot
from loralab.training.gram import eigen, turned


@dataclass(frozen=True)
class LoRARite(PairRule):
    """Transformation-invariant adaptive steps.

    Args:
        eps: added to the root of V + ρ, and the share of its largest singular value below which a
            direction of a factor counts as missing.
        escape: False leaves out ρ, the default of the authors' PyTorch code.
        mean_rows: True divides ∇̄ᵀ∇̄ by the number of rows, as that code does; steps are then √rows
            times longer.
    """

    eps: Positive = 1e-6
    escape: bool = True
    mean_rows: bool = False

    def memory(self, site: SiteState) -> Tensors:
        # In the polar basis and not along ranks, which `resize` may change: hence "_", not ".".
        A, B = turned("A", site.t["A"]), turned("B", site.t["B"])
        square = (B.mT @ B).double()
        alike = {"m_A": A, "m_B": B, "basis_A": B, "basis_B": A, "v_A": square, "v_B": square}
        alike |= dict.fromkeys(("escaped_A", "escaped_B"), square[:, 0, 0])
        return {name: torch.zeros_like(x) for name, x in alike.items()}

    def step_pair(self, site: SiteState, hyper: Hyper) -> None:
        steps = {name: self._half(site, name) for name in OTHER}
        for name, step in steps.items():
            U = turned(name, site.t[name])
            decay = per_slot(hyper.weight_decay, U) * U
            move(U, U - per_slot(hyper.lr, U) * (step + decay), hyper.lr > 0)

    def _half(self, site: SiteState, name: str) -> Tensor:
        """Return M R_V^-ᵀ, the step of U [K, p, r]."""
        state, (_, g, V) = site.state, halves(site, name)
        parts = ("m_", "v_", "escaped_", "basis_")
        m, old, escaped, basis = (state[part + name].double() for part in parts)
        # Decays with which running means need no further bias correction.
        turns, betas = state["turns"].double(), (self.beta1, self.beta2)
        one, two = (b * (1 - b ** (turns - 1)) / (1 - b**turns) for b in betas)
        U, inverse = polar(V, self.eps)
        g = g.double() @ inverse
        P = U.mT @ basis
        carried = P @ old @ P.mT
        square = g.mT @ g / (g.shape[-2] if self.mean_rows else 1)
        second = per_slot(two, old) * carried + per_slot(1 - two, old) * square
        if self.escape:
            escaped = two * (escaped + _lost(old, carried))
        root, Q = eigen(second)
        root = (root.clamp_min(0) + per_slot(escaped, root)).sqrt() + self.eps
        S = g @ (Q / root.unsqueeze(-2)) @ Q.mT
        m = per_slot(one, g) * (m @ P.mT) + per_slot(1 - one, g) * S
        kept = zip(parts, (m.to(V), second, escaped, U.to(V)), strict=True)
        state.update({part + name: x for part, x in kept})
        return (m @ inverse.mT).to(V)


def _lost(old: Tensor, new: Tensor) -> Tensor:
    """Return d(old, new) [*], the mass that escaped; a `resize` between them changes their size."""
    n = max(old.shape[-1], new.shape[-1])
    values, _ = eigen(torch.stack([F.pad(x, (0, n - x.shape[-1]) * 2) for x in (old, new)]))
    gaps = values[0] - values[1]
    return torch.minimum(gaps.amax(-1), gaps.sum(-1)).clamp_min(0)


register("lora_rite", "optimization", __doc__, LoRA(), rule=LoRARite())
