"""RandLoRA: dW = s Σ_i B_i Λ_i A Γ_i, n random bases, n r = min(m, n).

B_i and A are random, frozen and shared by all layers; Λ_i (r numbers) and Γ_i (one number per unit
of the layer's smaller side) are trained. Where the outputs are the smaller side, dW is transposed.

:summary: A full-rank update from frozen random bases, of which only diagonals are trained
:equation: dW = (alpha / r) sum_i B_i diag(l_i) A diag(g_i), i = 1..ceil(min(m, n) / r)
:trap: The parameter count falls as r grows: n = min(m, n) / r bases of min(m, n) numbers.
:trap: The diagonals act on the layer's smaller side: the roles turn where outputs are the fewer.
:trap: Alpha is 20 r by default, so learning rates are far below LoRA's.
:title: RandLoRA: Full-rank parameter-efficient fine-tuning of large models
:authors: Paul Albert, Frederic Z. Zhang, Hemanth Saratchandran, Cristian Rodriguez-Opazo, Anton van
    den Hengel, Ehsan Abbasnejad
:source: arXiv 2502.00987, 2025: section 4
:verified: authors' code and equality with installed PEFT up to the order of the random columns,
    which PEFT pairs differently
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class RandLoRA(Form):
    """Diagonals over random bases whose ranks add up to full rank."""

    frozen: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    shared: ClassVar[Mapping[str, str]] = {"A": "model", "B": "model"}
    dense: ClassVar[bool] = True  # A Γ_i of all bases together has the size of W
    any_rank: ClassVar[bool] = True

    def default_alpha(self, rank: int) -> float:
        """Return 20 r. The paper prints s = 2/√n; its author withdrew that for 2 r to 20 r over
        bases of unit variance (issue 1 of the authors' repository), and PEFT has 20 r.
        """
        return 20.0 * rank

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [r, small], B [large, n r], Lambda [n, r] = 0, Gamma [n, small] = 1 / small."""
        small, large = sorted((site.d_in, site.d_out))
        n = -(-small // site.rank)
        # U(±√3) has unit variance; the authors divide Kaiming-uniform draws by their spread.
        return {
            "A": uniform(evidence, "A", site.rank, small, bound=3**0.5),
            "B": uniform(evidence, "B", large, n * site.rank, bound=3**0.5),
            "Lambda": evidence.weight.new_zeros(n, site.rank),
            "Gamma": evidence.weight.new_zeros(n, small) + 1 / max(n, small),
        }

    def _bases(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor, Tensor]:
        """Return all bases at once: B [*, large, n r], Λ [*, n r], A Γ_i [*, n r, small]."""
        small, large = sorted((site.d_in, site.d_out))
        B, width = t["B"][..., :large, :], t["Lambda"].shape[-2] * site.rank
        if width > B.shape[-1]:  # a rank_pattern of ranks that do not divide: begin again
            B = torch.cat([B, B[..., : width - B.shape[-1]]], -1)
        B = B[..., :width]
        AG = t["A"][..., None, : site.rank, :small] * t["Gamma"].unsqueeze(-2)
        return B, t["Lambda"].flatten(-2), AG.flatten(-3, -2)

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        B, L, AG = self._bases(t, site)
        scaled = L.unsqueeze(-1) * AG
        return (B, scaled) if site.d_out >= site.d_in else (scaled.mT, B.mT)

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        # Λ acts on the activations, so that A Γ is the only W-sized temporary.
        B, L, AG = self._bases(t, site)
        first, last = (AG.mT, B.mT) if site.d_out >= site.d_in else (B, AG)
        return ((x @ first) * L.unsqueeze(-2)) @ last


register("randlora", "sharing", __doc__, RandLoRA())
