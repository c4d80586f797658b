"""DenseLoRA: h = W x + s Dec(M_i Enc(x)), Enc(x) = σ(A x), Dec(z) = σ(B z), with one encoder A and
one decoder B per kind of layer and an r x r M_i per layer.

The activation σ is GELU in the authors' code. The survey arXiv 2601.22708 has the formula without
one, and then it can be merged: `recipe("denselora", form=LinearDenseLoRA())`.

:summary: An r x r core per layer between an encoder and a decoder shared by its kind
:equation: y = W x + (alpha / r) gelu(B M_i gelu(A x)), A and B shared by a kind
:trap: With its activations there is no dW and it cannot be merged; the linear form can.
:trap: GELU after the decoder bounds the update from below at -0.17 s per output.
:trap: The layer's own part is only r² numbers, so ranks are large: 192 in the survey.
:title: DenseLoRA: Dense Low-Rank Adaptation of Large Language Models
:authors: Lin Mu, Xiaoyu Wang, Li Ni, Yang Li, Zhize Wu, Peiquan Jin, Yiwen Zhang
:source: arXiv 2505.23808, 2025: section 3
:verified: authors' code (mulin-ahu/DenseLoRA, peft/tuners/lora.py) and a detailed note on the paper
    (papernotes.org); the survey for the linear form
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from loralab.methods import register
from loralab.methods.expansion.lora import plain_pair, uniform
from loralab.methods.sharing._shared import cut
from loralab.recipe import LAYERS, Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class SharedCoder(Form):
    """The tensors of both forms."""

    shared: ClassVar[Mapping[str, str]] = {"A": "kind", "B": "kind"}
    owns: ClassVar[frozenset[str]] = frozenset({"A", "M", "B"})

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [r, in], B [out, r] = 0 and M [r, r], Kaiming-uniform."""
        M = uniform(evidence, "M", site.rank, site.rank, bound=site.rank**-0.5)
        return plain_pair(site, evidence) | {"M": M}


@dataclass(frozen=True)
class DenseLoRA(SharedCoder):
    """A dense core between a shared encoder and a shared decoder, with GELU after both."""

    layers: ClassVar[frozenset[str]] = LAYERS - {"Embedding"}
    recomputed: ClassVar[frozenset[str]] = frozenset({"branch"})  # outputs as wide as y

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        B, A = cut(t, site)
        return F.gelu(F.gelu(x @ A.mT) @ t["M"].mT @ B.mT)


@dataclass(frozen=True)
class LinearDenseLoRA(SharedCoder):
    """The same without activations: dW = s B M_i A."""

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        B, A = cut(t, site)
        return B @ t["M"], A


register("denselora", "sharing", __doc__, DenseLoRA())
