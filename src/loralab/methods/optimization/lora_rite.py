"""LoRA-RITE: adaptive steps of Z = B A (the paper's A Bᵀ) that are the same whatever the split.

With polar decompositions A = U_A R_A and B = U_B R_B, for A (and likewise for B):
    ∇̄ = ∇A R_B⁻¹,   P = U_Bᵀ U_B₋,   V ← β2 P V Pᵀ + (1 - β2) ∇̄ᵀ∇̄,   ρ ← β2 (ρ + d(V₋, P V₋ Pᵀ)),
    S = ∇̄ (V + ρ I)^-½,   M ← β1 M Pᵀ + (1 - β1) S,   A ← A - η M R_B^-ᵀ,
with bias-corrected decays; d(X, Y) = min(max_i λ_i(X) - λ_i(Y), tr X - tr Y), at least 0, is what
the change of basis lost.

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
from torch import Tensor

from loralab.bounds import Positive
from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.methods.optimization import _moments as moments
from loralab.methods.optimization import _pairs as pairs
from loralab.recipe import Hyper, SiteState, Tensors
from loralab.training.adamw import per_slot
from loralab.training.gram import turned


@dataclass(frozen=True)
class LoRARite(pairs.PairRule):
    """Transformation-invariant adaptive steps.

    Args:
        eps: added to the root of V + ρ; directions of a factor below this share are missing.
        escape: False leaves out ρ, the default of the authors' PyTorch code.
        mean_rows: divide ∇̄ᵀ∇̄ by the number of rows as that code does: steps √rows times longer.
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

    def half(self, site: SiteState, name: str, hyper: Hyper) -> Tensor:
        state, (U, g, V) = site.state, pairs.halves(site, name)
        keys = [part + name for part in ("m_", "v_", "escaped_", "basis_")]
        m, old, escaped, basis = (state[key].double() for key in keys)
        one, two = (moments.corrected(b, state["turns"].double()) for b in (self.beta1, self.beta2))
        U_V, inverse = pairs.polar(V, self.eps)
        g = g.double() @ inverse
        P = U_V.mT @ basis
        carried = P @ old @ P.mT
        square = g.mT @ g / (g.shape[-2] if self.mean_rows else 1)
        second = per_slot(two, old) * carried + per_slot(1 - two, old) * square
        if self.escape:
            escaped = two * (escaped + moments.lost(old, carried))
        S = moments.whitened(g, second, escaped, self.eps)
        m = per_slot(one, g) * (m @ P.mT) + per_slot(1 - one, g) * S
        state.update(zip(keys, (m.to(V), second, escaped, U_V.to(V)), strict=True))
        return pairs.descended(U, (m @ inverse.mT).to(V), hyper)


register("lora_rite", "optimization", __doc__, LoRA(), rule=LoRARite())
