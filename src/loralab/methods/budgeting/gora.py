"""GoRA, arXiv 2502.12171, section 3: ranks and B0 from the gradient G at the base.

I(W) = mean |W ∘ G|, a_i = I_i / Σ_j I_j, b = Σ_i √(m_i + n_i) r_ref,
r_i = round(b a_i / √(m_i + n_i)) within [r_min, r_max]. A0 is LoRA's and, in our orientation,
B0 = -ξ G A0ᵀ (A0 A0ᵀ)⁻¹ with ξ = γ √n / α, n the inputs: the best image of -G in A0's row space, so
that s B0 A0 ≈ -γ G under the scale s = α / √r.

:summary: Ranks by |W ∘ G|, and a B that begins as the compressed gradient
:equation: r_i = round(b a_i / sqrt(m_i + n_i)), B0 = -gamma sqrt(n)/alpha G A0^T (A0 A0^T)^-1
:trap: The model begins one gradient step ahead of the base; anchored=True begins at the base and
    keeps of that step only the direction of B0.
:trap: The budget counts sqrt(m + n) per rank: the parameters stay near LoRA's, not equal.
:trap: B0 is minus the gradient's image; the authors' code (at 2f7d63c) shows no minus.
:trap: The scale is alpha / sqrt(r_i) with each layer's own rank.
:title: GoRA: Gradient-driven Adaptive Low Rank Adaptation
:authors: Haonan He, Peng Ye, Yuchen Ren, Yuan Yuan, Luyang Zhou, Shucun Ju, Lei Chen
:source: arXiv 2502.12171, 2025: section 3
:verified: a public reading of the paper (papernotes, NeurIPS 2025), the survey arXiv 2601.22708 and
    the authors' code (hhnqqq/MyTransformers, gora.py)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import plain_pair
from loralab.methods.optimization.rslora import RSLORA_FORM
from loralab.recipe import Evidence, Site, Start, Tensors


def gradient_of(evidence: Evidence, who: str) -> Tensor:
    """Return the gradient at the base, or raise UserError for the start `who` without data."""
    if evidence.gradient is None:
        raise UserError(f"{who} looks at gradients: give `data`, an iterable of batches")
    return evidence.gradient


def sensitivity(evidence: Evidence, who: str) -> float:
    """Return mean |W ∘ G|."""
    return (evidence.weight * gradient_of(evidence, who)).abs().mean().item()


def share_out(
    sites: Sequence[Site],
    importance: Mapping[str, float],
    least: float,
    most: float,
    smoothing: str = "sqrt",
    rounded: Callable[[float], int] = round,
) -> dict[str, int] | None:
    """Return ranks in proportion to importance, the (smoothed) parameter count held.

    Args:
        least, most: bounds of a rank in units of the one asked for.
        smoothing: weigh a layer by √(m + n) ("sqrt", as printed) or by m + n ("none").
    """
    weigh = SMOOTHING[smoothing]
    total = sum(importance.values())
    if not 0 < total < math.inf:  # no gradient anywhere says nothing about the layers
        return None
    asked = {s.name: s.asked or s.rank for s in sites}
    budget = sum(weigh(s.d_in + s.d_out) * asked[s.name] for s in sites)
    ranks = {}
    for s in sites:
        rank = rounded(budget * importance[s.name] / total / weigh(s.d_in + s.d_out))
        low, high = max(1, round(least * asked[s.name])), round(most * asked[s.name])
        ranks[s.name] = min(max(rank, low), high, s.d_in, s.d_out)
    return ranks


SMOOTHING: dict[str, Callable[[float], float]] = {"sqrt": math.sqrt, "none": float}


def check_bounds(piece: str, least: float, most: float, smoothing: str) -> None:
    """Raise UserError unless 0 < least <= 1 <= most and `smoothing` is known."""
    if not (0 < least <= 1 <= most):
        raise UserError(
            f"least and most of {piece} are multiples of the rank asked for, on either side of 1, "
            f"not {least} and {most}"
        )
    if smoothing not in SMOOTHING:
        raise UserError(f"smoothing of {piece} is 'sqrt' or 'none', not {smoothing!r}")


class RanksOnly(Start):
    """Base of starts that choose ranks and leave the tensors to the Form."""

    pair_only: ClassVar[bool] = False

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        return {}


@dataclass(frozen=True)
class GoRA(Start):
    """Ranks by sensitivity, B by the compressed gradient.

    Args:
        gamma: γ, the length of the first step in units of the gradient; not negative.
        least, most: r_min and r_max in units of the rank asked for (4 and 32 at 8 in the paper).
        smoothing: "sqrt" as in the paper; "none" as in the authors' scripts.
        anchored: begin at the base; the paper's model begins at W + s B0 A0, one gradient step
            ahead.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    departs: ClassVar[bool] = True

    gamma: float = 0.05
    least: float = 0.5
    most: float = 4.0
    smoothing: str = "sqrt"
    anchored: bool = False

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise UserError(f"gamma of GoRA must not be negative, it is {self.gamma!r}")
        check_bounds("GoRA", self.least, self.most, self.smoothing)

    def ranks(
        self, sites: Sequence[Site], evidence: Callable[[Site], Evidence]
    ) -> dict[str, int] | None:
        importance = {s.name: sensitivity(evidence(s), "GoRA") for s in sites}
        return share_out(sites, importance, self.least, self.most, self.smoothing)

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        G, A = gradient_of(evidence, "GoRA"), plain_pair(site, evidence)["A"]
        # γ √(n/r) / s is ξ under s = α/√r, and keeps s B0 A0 = -γ √(n/r) G P_A under any s.
        xi = self.gamma * math.sqrt(site.d_in / site.rank) / evidence.scale
        # The minus sign is the paper's; the authors' code (at 2f7d63c) shows none.
        Q, R = torch.linalg.qr(A.mT.double())  # A0ᵀ (A0 A0ᵀ)⁻¹ = Q R⁻ᵀ
        B = -xi * torch.linalg.solve_triangular(R.mT, G.double() @ Q, upper=False, left=False)
        return {"A": A, "B": B.to(A)}


register("gora", "budgeting", __doc__, RSLORA_FORM, start=GoRA())
