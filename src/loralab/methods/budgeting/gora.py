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
:trap: The authors' scripts train with LoRA+ at ratio 16; the default here is plain AdamW.
:title: GoRA: Gradient-driven Adaptive Low Rank Adaptation
:authors: Haonan He, Peng Ye, Yuchen Ren, Yuan Yuan, Luyang Zhou, Shucun Ju, Lei Chen
:source: arXiv 2502.12171, 2025: section 3
:verified: a public reading of the paper (papernotes, NeurIPS 2025), the survey arXiv 2601.22708 and
    the authors' code (hhnqqq/MyTransformers, gora.py at 2f7d63c and its scripts)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from loralab.bounds import NonNegative
from loralab.methods import register
from loralab.methods.budgeting._evidence import Proportional, gradient_of, sensitivity
from loralab.methods.expansion.lora import plain_pair
from loralab.methods.optimization.rslora import RSLORA_FORM
from loralab.recipe import Evidence, Look, Site, Tensors


@dataclass(frozen=True)
class GoRA(Proportional):
    """Ranks by sensitivity, B by the compressed gradient; "none" as smoothing is the scripts'.

    Args:
        gamma: γ, the length of the first step in units of the gradient.
        anchored: begin at the base; the paper's model begins at W + s B0 A0, one gradient step
            ahead.
    """

    departs: ClassVar[bool] = True

    gamma: NonNegative = 0.05
    anchored: bool = False

    def ranks(self, sites: Sequence[Site], evidence: Look) -> dict[str, int] | None:
        importance = {s.name: sensitivity(evidence(s), "GoRA") for s in sites}
        # The formula rounds; the authors' code, whose scripts have no smoothing, rounds down.
        rounded = math.floor if self.smoothing == "none" else round
        return self.share_out(sites, importance, rounded)

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        G, A = gradient_of(evidence, "GoRA"), plain_pair(site, evidence)["A"]
        # γ √(n/r) / s is ξ under s = α/√r, and keeps s B0 A0 = -γ √(n/r) G P_A under any s.
        xi = self.gamma * math.sqrt(site.d_in / site.rank) / evidence.scale
        Q, R = torch.linalg.qr(A.mT.double())  # A0ᵀ (A0 A0ᵀ)⁻¹ = Q R⁻ᵀ
        B = -xi * torch.linalg.solve_triangular(R.mT, G.double() @ Q, upper=False, left=False)
        return {"A": A, "B": B.to(A)}


register("gora", "budgeting", __doc__, RSLORA_FORM, start=GoRA())
