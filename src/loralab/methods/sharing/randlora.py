"""RandLoRA: dW = (2/√n) Σ_i B_i Λ_i A Γ_i, n random bases, n = min(in, out) / r.

B_i and A are random, frozen and shared by all layers; Λ_i (r numbers) and Γ_i (one number per unit
of the smaller side) are trained. Where the outputs are the smaller side, dW is transposed.

:summary: A full-rank update from frozen random bases, of which only diagonals are trained
:equation: dW = (2 / sqrt(n)) sum_i B_i diag(l_i) A diag(g_i), i = 1..n, n = ceil(min(in, out) / r)
:trap: The parameter count falls as r grows: n bases of min(in, out) numbers.
:trap: scaling="alpha/r" is 10 sqrt(n) times larger and wants other learning rates.
:title: RandLoRA: Full-rank parameter-efficient fine-tuning of large models
:authors: Paul Albert, Frederic Z. Zhang, Hemanth Saratchandran, Cristian Rodriguez-Opazo, Anton van
    den Hengel, Ehsan Abbasnejad
:source: arXiv 2502.00987, 2025: eq. 4, section 4.2; the factor 2 / sqrt(n) in table 9
:verified: paper, authors' code; equality with PEFT, which pairs the random columns otherwise
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class RandLoRA(Form):
    """Diagonals over random bases whose ranks add up to full rank.

    Args:
        scaling: s, in units of alpha / r: "2/sqrt(n)" as printed, with alpha = r, or "alpha/r" with
            alpha = 20 r as in PEFT; the author came to 2 r to 20 r (issue 1 of the repository).
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    shared: ClassVar[Mapping[str, str]] = {"A": "model", "B": "model"}
    dense: ClassVar[bool] = True  # A Γ_i of all bases together has the size of W
    any_rank: ClassVar[bool] = True
    scaling: Literal["2/sqrt(n)", "alpha/r"] = "2/sqrt(n)"

    def default_alpha(self, rank: int) -> float:
        return rank * (20.0 if self.scaling == "alpha/r" else 1.0)

    def factor(self, n: int) -> float:
        """Return what multiplies alpha / r where there are n bases."""
        return 1.0 if self.scaling == "alpha/r" else 2 / n**0.5

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [r, small], B [large, n r], Lambda [n, r] = 0, Gamma [n, small] = 1 / small."""
        (small, large), r = sorted((site.d_in, site.d_out)), site.rank
        n, zeros = -(-small // r), evidence.weight.new_zeros
        t = {"A": uniform(evidence, "A", r, small, bound=3**0.5)}  # unit variance
        t["B"] = uniform(evidence, "B", large, n * r, bound=3**0.5)
        return t | {"Lambda": zeros(n, r), "Gamma": zeros(n, small) + 1 / max(n, small)}

    def _bases(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor, Tensor]:
        """Return all bases at once: B [*, large, n r], Λ [*, n r], A Γ_i [*, n r, small]."""
        small, large = sorted((site.d_in, site.d_out))
        L = t["Lambda"].flatten(-2) * self.factor(t["Lambda"].shape[-2])
        B = t["B"][..., :large, :]
        if L.shape[-1] > B.shape[-1]:  # a rank_pattern of ranks that do not divide: begin again
            B = torch.cat([B, B[..., : L.shape[-1] - B.shape[-1]]], -1)
        AG = t["A"][..., None, : site.rank, :small] * t["Gamma"].unsqueeze(-2)
        return B[..., : L.shape[-1]], L.unsqueeze(-1), AG.flatten(-3, -2)

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        B, L, AG = self._bases(t, site)
        return (B, L * AG) if site.d_out >= site.d_in else ((L * AG).mT, B.mT)

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        # Λ acts on the activations, so that A Γ is the only W-sized temporary.
        B, L, AG = self._bases(t, site)
        first, last = (AG.mT, B.mT) if site.d_out >= site.d_in else (B, AG)
        return ((x @ first) * L.mT) @ last


register("randlora", "sharing", __doc__, RandLoRA())
