"""LoRA-RITE, arXiv 2410.20625, algorithm 1: adaptive steps of Z = A Bᵀ, whatever the split.

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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.recipe import Hyper, Rule, SiteState
from loralab.training.adamw import adamw_step, check_moments, per_slot
from loralab.training.gram import eigen, others, turned


@dataclass(frozen=True)
class LoRARite(Rule):
    """Transformation-invariant adaptive steps for a pair; other tensors take plain AdamW.

    Args:
        eps: added to the root of V + ρ, and the share of its largest singular value below which a
            direction of a factor counts as missing.
        escape: False leaves out ρ, the default of the authors' PyTorch code.
        mean_rows: True divides ∇̄ᵀ∇̄ by the number of rows, as that code does; steps are then √rows
            times longer.
    """

    pair_only: ClassVar[bool] = True
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    inverts: ClassVar[bool] = True

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    escape: bool = True
    mean_rows: bool = False

    def __post_init__(self) -> None:
        check_moments(self)

    def step(self, sites: Sequence[SiteState], hyper: Hyper) -> None:
        if rest := others(sites):
            adamw_step(self, rest, hyper, self.beta1, self.beta2, self.eps)
        for site in sites:
            if "turns" not in site.state:
                site.state["turns"] = torch.zeros_like(hyper.lr)
            site.state["turns"] += 1
            A, B = turned("A", site.t["A"]), site.t["B"]
            steps = self._half(site, "A", B), self._half(site, "B", A)
            for factor, step in zip((A, B), steps, strict=True):
                decay = per_slot(hyper.weight_decay, factor) * factor
                moved = factor - per_slot(hyper.lr, factor) * (step + decay)
                factor.copy_(torch.where(per_slot(hyper.lr > 0, factor), moved, factor))

    def _half(self, site: SiteState, name: str, V: Tensor) -> Tensor:
        """Return the step [K, p, r] of the factor called `name`; V is the other one."""
        state = site.state
        U, inverse = polar(V, self.eps)
        g = turned(name, site.g[name]).double() @ inverse
        # All in the polar basis and not along ranks, which `resize` may change: hence "_".
        if "v_" + name not in state:
            state["m_" + name] = torch.zeros_like(site.t[name])
            state["v_" + name] = torch.zeros_like(inverse)
            state["escaped_" + name] = torch.zeros_like(inverse[..., 0, 0])
            state["basis_" + name] = U.to(V)
        P = U.mT @ state["basis_" + name].double()
        turns = state["turns"].double()
        one, two = (_decay(beta, turns) for beta in (self.beta1, self.beta2))
        old = state["v_" + name]
        carried = P @ old @ P.mT
        square = g.mT @ g / (g.shape[-2] if self.mean_rows else 1)
        second = per_slot(two, old) * carried + per_slot(1 - two, old) * square
        escaped = state["escaped_" + name]
        if self.escape:
            escaped = two * (escaped + _lost(old, carried))
        root, Q = eigen(second)
        root = (root.clamp_min(0) + per_slot(escaped, root)).sqrt() + self.eps
        S = g @ (Q / root.unsqueeze(-2)) @ Q.mT
        m = turned(name, state["m_" + name]).double() @ P.mT
        m = per_slot(one, g) * m + per_slot(1 - one, g) * S
        state["m_" + name] = turned(name, m).to(V)
        state["v_" + name], state["escaped_" + name] = second, escaped
        state["basis_" + name] = U.to(V)
        return (m @ inverse.mT).to(V)


def polar(V: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return U [*, p, r] and R⁺ [*, r, r] of V = U R with R = (VᵀV)^½, in fp64.

    Directions that V lacks are 0 in both, as with a pseudo-inverse.
    """
    V = V.double()
    squares, Q = eigen(V.mT @ V)
    present = squares > (eps**2 * squares[..., -1:]).clamp_min(torch.finfo(squares.dtype).tiny)
    inverse = torch.where(present, squares.clamp_min(0).rsqrt(), 0.0)
    inverse = (Q * inverse.unsqueeze(-2)) @ Q.mT
    return V @ inverse, inverse


def _lost(old: Tensor, new: Tensor) -> Tensor:
    """Return the mass that escaped, d(old, new) [*]."""
    n = max(old.shape[-1], new.shape[-1])
    both = [F.pad(x, (0, n - x.shape[-1]) * 2).nan_to_num(0.0, 0.0, 0.0) for x in (old, new)]
    both = torch.linalg.eigvalsh(torch.stack(both))
    largest = (both[0] - both[1]).amax(-1)
    trace = old.diagonal(dim1=-2, dim2=-1).sum(-1) - new.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.minimum(largest.clamp_min(0), trace.clamp_min(0))


def _decay(beta: float, turns: Tensor) -> Tensor:
    """Return the decay with which a running mean needs no further bias correction."""
    return beta * (1 - beta ** (turns - 1)) / (1 - beta**turns)


register("lora_rite", "optimization", __doc__, LoRA(), rule=LoRARite())
