"""Block-diagonal rotations of a layer's input, which OFT and BOFT are made of, and COFT's ball."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import Positive
from loralab.methods.optimization._unscaled import Unscaled
from loralab.recipe import Evidence, Hyper, Site, SiteState, Tensors
from loralab.training.adamw import AdamW


@dataclass(frozen=True)
class Rotation(Unscaled):
    """Base of rotations by b x b blocks; b is the rank, or the next smaller one that fits.

    Args:
        rescale: also train a factor s per output, which comes after the rotation.
    """

    any_rank: ClassVar[bool] = True

    rescale: bool = False

    def at_rest(self, evidence: Evidence, b: int, *shape: int) -> Tensors:
        """Return theta [*shape, b (b - 1) / 2] = 0, and s [out] = 1 if asked for."""
        W = evidence.weight
        t = {"theta": W.new_zeros(*shape, b * (b - 1) // 2)}
        return t | ({"s": W.new_ones(len(W))} if self.rescale else {})

    def outer(self, t: Tensors, y: Tensor, site: Site) -> Tensor:
        return (y * t["s"].unsqueeze(-2)).to(y.dtype) if self.rescale else y


@dataclass(frozen=True)
class BallAdamW(AdamW):
    """AdamW, then the projection of every Q_i on ‖Q_i‖_F ≤ ε b² / √(number of blocks).

    The ball is that of arXiv 2306.07280, section 3.4, its radius the authors' code's.

    Args:
        coft: ε; the authors' DreamBooth script has 6e-5. None leaves Q free, which is OFT.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"theta"})

    coft: Positive | None = None

    def step(self, sites: Sequence[SiteState], hyper: Hyper) -> None:
        super().step(sites, hyper)
        if self.coft is None:
            return
        for theta in (site.t["theta"] for site in sites):
            radius = self.coft * block(theta) ** 2 / theta.shape[-2] ** 0.5
            norm = 2**0.5 * theta.norm(dim=-1, keepdim=True)  # of Q, which has every entry twice
            theta.mul_((radius / norm.clamp_min(1e-30)).clamp_max(1.0))


def block(theta: Tensor) -> int:
    """Return b for theta [*, b (b - 1) / 2]."""
    return round((1 + (1 + 8 * theta.shape[-1]) ** 0.5) / 2)


def skew(theta: Tensor, b: int) -> Tensor:
    """Return Q = -Qᵀ [*, b, b] with theta [*, b (b - 1) / 2] above its diagonal, row by row."""
    place = torch.zeros(b, b, dtype=torch.long, device=theta.device)
    rows, cols = torch.triu_indices(b, b, 1, device=theta.device)
    place[rows, cols] = torch.arange(len(rows), device=theta.device)
    sign = torch.ones(b, b, dtype=theta.dtype, device=theta.device)
    return theta[..., place + place.T] * (sign.triu(1) - sign.tril(-1))


def cayley(Q: Tensor, neumann: int = 0) -> Tensor:
    """Return (I + Q)(I - Q)⁻¹, or (I + Q)(I + Q + ... + Q^neumann) in its place."""
    one = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    if not neumann:
        # I - Q is regular, but not after rounding in a diverged slot; `solve` would raise for all.
        return torch.linalg.solve_ex(one - Q, one + Q).result
    series = one.expand_as(Q)
    for _ in range(neumann):
        series = one + Q @ series
    return series + Q @ series


def turn(x: Tensor, R: Tensor) -> Tensor:
    """Return Rᵀ x for rows x [*, n, in] and diagonal blocks R [*, in / b, b, b]."""
    parts = x.unflatten(-1, (-1, R.shape[-1])).transpose(-3, -2)
    return (parts @ R.to(x.dtype)).transpose(-3, -2).flatten(-2)


def butterfly(x: Tensor, R: Tensor, k: int) -> Tensor:
    """Return B̃(d, k)ᵀ x for rows x [*, n, d] and BOFT's blocks R [*, d / b, b, b]."""
    h = R.shape[-1] // 2
    if k == 2:
        return turn(x, R)
    apart = x.unflatten(-1, (-1, 2, k // 2, h)).transpose(-3, -2)
    turned = turn(apart.flatten(-4), R).view(apart.shape)
    return turned.transpose(-3, -2).flatten(-4)
