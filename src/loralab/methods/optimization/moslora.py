"""MoSLoRA: dW = s B W_mix A with a trained r x r mixer W_mix.

B A is Σ_i b_i a_iᵀ; the mixer M joins every b_i with every a_j. LoRA is W_mix = I.

:summary: A trained r x r mixer between A and B
:equation: dW = s B M A, M [r, r]
:trap: At most one of B and the mixer may start at 0.
:trap: The product has LoRA's rank; the mixer changes how it is learned, not what it can be.
:title: Mixture-of-Subspaces in Low-Rank Adaptation
:authors: Taiqiang Wu, Jiahao Wang, Zhe Zhao, Ngai Wong
:source: arXiv 2406.11909, 2024: sections 3.1 (eq. 7) and 3.2 (the mixer's start)
:verified: authors' code (wutaiqiang/MoSLoRA peft/tuners/lora/layer.py), a Korean account of the
    paper, section by section with its equations, and the survey arXiv 2601.22708; the text itself
    was not to be had
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loralab.methods import register
from loralab.methods.expansion.lora import plain_pair, uniform
from loralab.recipe import Evidence, Form, Site, Tensors


def orthogonal(evidence: Evidence, purpose: str, size: int) -> Tensor:
    """Return a random orthogonal matrix, uniform over all of them."""
    g = evidence.generator(purpose)
    Q, R = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))
    return (Q * R.diagonal().sign()).to(evidence.weight)


@dataclass(frozen=True)
class MoSLoRA(Form):
    """A pair with a matrix between.

    Args:
        mixer: how it starts: "kaiming" (U(±1/√r), the authors' runs) or "orthogonal"; the paper
            finds both good. From 0 with B = 0 nothing would ever learn.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "M"})

    mixer: Literal["kaiming", "orthogonal"] = "kaiming"

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return LoRA's A and B = 0, and the mixer M [r, r]."""
        r = site.rank
        if self.mixer == "orthogonal":
            M = orthogonal(evidence, "M", r)
        else:
            M = uniform(evidence, "M", r, r, bound=r**-0.5)
        return plain_pair(site, evidence) | {"M": M}

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return t["B"] @ t["M"], t["A"]


register("moslora", "optimization", __doc__, MoSLoRA())
