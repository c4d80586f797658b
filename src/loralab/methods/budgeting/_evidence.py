"""What starts read off the data: gradients, covariances, and ranks in proportion to importance."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from loralab.bounds import AtLeastOne, OneOf, SomeShare
from loralab.errors import UserError
from loralab.methods.expansion.lora import Pair
from loralab.recipe import Evidence, Site, Start, Tensors

SMOOTHING: dict[str, Callable[[float], float]] = {"sqrt": math.sqrt, "none": float}


def gradient_of(evidence: Evidence, who: str) -> Tensor:
    """Return the gradient at the base, or raise UserError for the start `who` without data."""
    if evidence.gradient is None:
        raise UserError(f"{who} looks at gradients: give `data`, an iterable of batches")
    return evidence.gradient


def covariance_of(evidence: Evidence, who: str) -> Tensor:
    """Return mean x xᵀ in fp64, or raise UserError for the piece `who` without data."""
    if evidence.covariance is None:
        raise UserError(f"{who} looks at the layers' inputs: give `data`, an iterable of batches")
    return evidence.covariance.double()


def sensitivity(evidence: Evidence, who: str) -> float:
    """Return mean |W ∘ G|."""
    return (evidence.weight * gradient_of(evidence, who)).abs().mean().item()


def effective_rank(G: Tensor) -> float:
    """Return exp of the entropy of G's normalised singular values (Roy and Vetterli, 2007)."""
    sigma = torch.linalg.svdvals(G.double())
    p = sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny)
    return max(1.0, torch.special.entr(p).sum().exp().item())


def adalomo_step(evidence: Evidence) -> Tensor:
    """Return the first step of AdaLomo on W, the learning rate left out.

    -max(10⁻³, rms W) U / max(1, rms U) with U = G / √(R Cᵀ / mean R), R and C the row and column
    means of G².
    """
    G = gradient_of(evidence, "DRaLoRA").double()
    square = G.square() + 1e-30
    rows, columns = square.mean(-1, keepdim=True), square.mean(-2, keepdim=True)
    U = G * (rows / rows.mean()).rsqrt() * columns.rsqrt()
    rms = evidence.weight.double().square().mean().sqrt().clamp_min(1e-3)
    return -rms * U / U.square().mean().sqrt().clamp_min(1)


@dataclass(frozen=True)
class Proportional(Start):
    """Base of starts whose ranks follow importance, the (smoothed) parameter count held.

    Args:
        least, most: r_min and r_max in units of the rank asked for (4 and 32 at 8 in GoRA).
        smoothing: weigh a layer by √(m + n) ("sqrt", as printed) or by m + n ("none").
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    least: SomeShare = 0.5
    most: AtLeastOne = 4.0
    smoothing: Annotated[str, OneOf(SMOOTHING)] = "sqrt"

    def share_out(
        self,
        sites: Sequence[Site],
        importance: Mapping[str, float],
        rounded: Callable[[float], int],
    ) -> dict[str, int] | None:
        """Return every site's rank, or None if no importance says anything about the layers."""
        total = sum(importance.values())
        if not 0 < total < math.inf:
            return None
        weight = {s.name: SMOOTHING[self.smoothing](s.d_in + s.d_out) for s in sites}
        asked = {s.name: s.asked or s.rank for s in sites}
        budget = sum(weight[s.name] * asked[s.name] for s in sites)
        ranks = {}
        for s in sites:
            rank = rounded(budget * importance[s.name] / total / weight[s.name])
            low = max(1, round(self.least * asked[s.name]))
            high = round(self.most * asked[s.name])
            ranks[s.name] = min(max(rank, low), high, s.d_in, s.d_out)
        return ranks


@dataclass(frozen=True)
class PairAndInputs(Pair):
    """LoRA's pair beside the size of each input, √(mean x_j²), measured at the base (PRILoRA)."""

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "x"})
    frozen: ClassVar[frozenset[str]] = frozenset({"x"})
    needs: ClassVar[frozenset[str]] = frozenset({"covariance"})

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [r, in], B [out, r] = 0 and x [in]; all sizes are 1 without data."""
        x = evidence.weight.new_ones(site.d_in)
        if evidence.covariance is not None:
            x = covariance_of(evidence, "PRILoRA").diagonal().clamp_min(0).sqrt().to(x)
        return super().init(site, evidence) | {"x": x}
