"""What the Rules have in common that move A and B by formulas of their own.

A formula is written for a factor U [K, p, r] of U Vᵀ: U = B and V = Aᵀ, or U = Aᵀ and V = B.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.recipe import Hyper, SiteState, Tensors
from loralab.training.adamw import AdamW, per_slot
from loralab.training.gram import eigen, inverse_gram, others, turned

OTHER = {"A": "B", "B": "A"}


@dataclass(frozen=True)
class PairRule(AdamW):
    """Steps of its own for A and B; other tensors of the Form take plain AdamW."""

    pair_only: ClassVar[bool] = True
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    inverts: ClassVar[bool] = True

    def step(self, sites: Sequence[SiteState], hyper: Hyper) -> None:
        if rest := others(sites):
            super().step(rest, hyper)
        for site in sites:
            if "turns" not in site.state:
                site.state.update(self.memory(site), turns=torch.zeros_like(hyper.lr))
            site.state["turns"] += 1
            self.step_pair(site, hyper)

    def memory(self, site: SiteState) -> Tensors:
        """Return what the site's state holds before the first step."""
        return {}

    def step_pair(self, site: SiteState, hyper: Hyper) -> None:
        """Move the site's A and B; `turns` in its state counts from 1."""
        moved = {name: self.half(site, name, hyper) for name in OTHER}
        for name, U in moved.items():
            turned(name, site.t[name]).copy_(U)

    def half(self, site: SiteState, name: str, hyper: Hyper) -> Tensor:
        """Return U, the factor called `name`, moved; both halves see the factors as they were."""
        raise NotImplementedError


@dataclass(frozen=True)
class TurnRule(PairRule):
    """Steps of one factor at a time, with a momentum that is carried along when the other moves."""

    first: ClassVar[str]  # which one moves in the first step

    def memory(self, site: SiteState) -> Tensors:
        """Return momenta, and the factors that they were seen through."""
        momenta = {"m." + name: torch.zeros_like(site.t[name]) for name in OTHER}
        return momenta | {"old." + name: site.t[name].clone() for name in OTHER}

    def is_turn(self, site: SiteState, name: str) -> Tensor:
        """Return the slots [K] in which the factor called `name` moves."""
        odd = site.state["turns"] % 2 == 1
        return odd if name == self.first else ~odd


def halves(site: SiteState, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, the factor called `name`, its gradient and V."""
    U, g, V = site.t[name], site.g[name], site.t[OTHER[name]]
    return turned(name, U), turned(name, g), turned(OTHER[name], V)


def remembered(site: SiteState, name: str) -> tuple[Tensor, Tensor]:
    """Return the momentum of U, the factor called `name`, and V₋, the V it was seen through."""
    old = site.state["old." + OTHER[name]]
    return turned(name, site.state["m." + name]), turned(OTHER[name], old)


def seen_through(V: Tensor, V_old: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return S = (VᵀV + damping I)⁻¹ and R = (V₋ᵀ V) S, [K, r, r], worked out in fp64."""
    S = inverse_gram(V, damping)
    return S.to(V), (V_old.mT.double() @ V.double() @ S).to(V)


def move(tensor: Tensor, to: Tensor, where: Tensor) -> None:
    """Set the slots `where` [K] of a tensor; the others keep what they have to the bit."""
    tensor.copy_(torch.where(per_slot(where, tensor), to, tensor))


def descended(U: Tensor, update: Tensor, hyper: Hyper) -> Tensor:
    """Return U - lr (update + decay U), or U itself in slots without a rate."""
    moved = U - per_slot(hyper.lr, U) * (update + per_slot(hyper.weight_decay, U) * U)
    return torch.where(per_slot(hyper.lr > 0, U), moved, U)


def polar(V: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return U [*, p, r] and R⁺ [*, r, r] of V = U R with R = (VᵀV)^½, in fp64.

    Directions that V lacks, or has to less than the share eps or rounding, are 0 in both, as with
    a pseudo-inverse.
    """
    # What steps leave of rounding in a direction without gradient is no direction of V: its inverse
    # would be a huge step.
    eps, V = max(eps, 1000 * torch.finfo(V.dtype).eps), V.double()
    squares, Q = eigen(V.mT @ V)
    present = squares > (eps**2 * squares[..., -1:]).clamp_min(torch.finfo(squares.dtype).tiny)
    inverse = torch.where(present, squares.clamp_min(0).rsqrt(), 0.0)
    inverse = (Q * inverse.unsqueeze(-2)) @ Q.mT
    return V @ inverse, inverse


def sylvester(P: Tensor, Q: Tensor, C: Tensor) -> Tensor:
    """Return X with P X + X Q = C for symmetric, positive semi-definite P and Q, in fp64."""
    (p, U), (q, V) = eigen(P), eigen(Q)
    sums = p.clamp_min(0)[..., :, None] + q.clamp_min(0)[..., None, :]
    return U @ ((U.mT @ C @ V) / sums.clamp_min(torch.finfo(sums.dtype).tiny)) @ V.mT


def product_norm(B: Tensor, A: Tensor) -> Tensor:
    """Return ‖B A‖_F [K], without the product."""
    return ((B.mT @ B) * (A @ A.mT)).sum((-2, -1)).clamp_min(0).sqrt()
