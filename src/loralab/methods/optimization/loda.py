"""LoDA: y = W x + s (B A x + f2(B f1(A x))), a non-linear low-dimensional map.

f1(h) = σ(M2 σ(M1 σ(h))) with two trained r x r matrices, f2 = σ, σ = LeakyReLU; LoRA is the case
without the second term. The formula is that of the survey arXiv 2601.22708 ("LoDA(+)"), which finds
no factor s in the original: α / r as in LoRA. The slope of σ, 0.8, is LoRAFactory's.

:summary: A small LeakyReLU network between A and B beside LoRA's linear branch
:equation: y = W x + s (B A x + f(B f(M2 f(M1 f(A x))))), f = LeakyReLU
:trap: It is not linear in x, so there is no dW and it cannot be merged.
:trap: Both terms use the same A and B.
:title: LoDA: Low-Dimensional Adaptation of Large Language Models
:authors: Jing Liu, Toshiaki Koike-Akino, Pu Wang, Matthew Brand, Ye Wang, Kieran Parsons
:source: MERL TR2023-150, 2023: as given by the survey arXiv 2601.22708
:verified: survey arXiv 2601.22708 and LoRAFactory (loda.py); the paper's text was not to be had
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import leaky_relu

from loralab.bounds import Share
from loralab.methods import register
from loralab.methods.expansion.lora import plain_pair, uniform
from loralab.recipe import LAYERS, Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class LoDA(Form):
    """LoRA's branch plus a small network in the same low dimension.

    Args:
        slope: of σ below 0; 1 makes everything linear.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "M1", "M2"})
    layers: ClassVar[frozenset[str]] = LAYERS - {"Embedding"}
    recomputed: ClassVar[frozenset[str]] = frozenset({"branch"})

    slope: Share = 0.8

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return LoRA's A and B = 0, and M1, M2 ~ U(±1/√r)."""
        r = site.rank
        mixers = {n: uniform(evidence, n, r, r, bound=r**-0.5) for n in ("M1", "M2")}
        return plain_pair(site, evidence) | mixers

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        h = x @ t["A"].mT
        f = leaky_relu(h, self.slope)
        for name in ("M1", "M2"):
            f = leaky_relu(f @ t[name].mT, self.slope)
        return h @ t["B"].mT + leaky_relu(f @ t["B"].mT, self.slope)


register("loda", "optimization", __doc__, LoDA())
