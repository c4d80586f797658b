"""GraLoRA: block (i, j) of a k x k grid maps part j of the inputs to part i of the outputs.

The A of one input part lie side by side, so that k thick products replace k² thin ones.

:summary: A k x k grid of small pairs instead of one pair: higher rank at LoRA's count
:equation: dW = s [B_ij A_ij], i, j = 1..k, each pair of rank r / k
:trap: Slice i of input part j goes to output part i; without the exchange of i and j the update is
    block-diagonal and of the wrong rank.
:trap: Inputs, outputs and rank must be multiples of k.
:trap: The hybrid ranks are part of r here and in the authors' code; PEFT adds them to r.
:title: GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning
:authors: Yeonjoon Jung, Daehyun Ahn, Hyungjun Kim, Taesu Kim, Eunhyeok Park
:source: arXiv 2505.20355, 2025: eq. 5, sections 3.1 and 3.5
:verified: paper (section 3), authors' code (SqueezeBits/GraLoRA), equality with installed PEFT
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import Count, CountOrZero
from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.methods.expansion.melora import check_parts
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class GraLoRA(Form):
    """A grid of pairs with LoRA's parameter count and up to k times its rank.

    Args:
        k: parts per side; the paper takes 2 up to rank 32 and 4 above.
        hybrid_rank: how many of the r ranks go to one ordinary pair (the paper's Hybrid GraLoRA).
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B"})

    k: Count = 2
    hybrid_rank: CountOrZero = 0

    @property
    def rank_multiple(self) -> int:
        return self.k if self.hybrid_rank % self.k == 0 else 1

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [k, in/k, g] and B [k, g, out/k] with g = r - hybrid_rank (PEFT's layout)."""
        k, h = self.k, self.hybrid_rank
        g, n = site.rank - h, site.d_in // k
        check_parts(self, k, site, inputs=site.d_in, outputs=site.d_out, rank=g)
        t = {
            "A": uniform(evidence, "A", k, n, g, bound=n**-0.5),
            "B": evidence.weight.new_zeros(k, g, site.d_out // k),
        }
        if h:
            t["A_hybrid"] = uniform(evidence, "A_hybrid", h, site.d_in, bound=site.d_in**-0.5)
            t["B_hybrid"] = evidence.weight.new_zeros(site.d_out, h)
        return t

    def delta(self, t: Tensors, site: Site) -> Tensor:
        A, B = t["A"].unflatten(-1, (self.k, -1)), t["B"].unflatten(-2, (self.k, -1))
        # A[j, n, i, r] and B[i, j, r, m]: slice i of part j's columns feeds output part i.
        D = torch.einsum("...jnir,...ijrm->...imjn", A, B).flatten(-2).flatten(-3, -2)
        return D + t["B_hybrid"] @ t["A_hybrid"] if self.hybrid_rank else D

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        parts = x.unflatten(-1, (self.k, -1)).transpose(-3, -2)
        # With the ranks as rows these products take a quarter of the time on a CPU.
        h = (t["A"].mT @ parts.mT).unflatten(-2, (self.k, -1))  # [j, i, r, tokens]
        h = h.transpose(-4, -3).flatten(-3, -2)  # [i, (j r), tokens]
        y = (h.mT @ t["B"]).transpose(-3, -2).flatten(-2)
        return y + (x @ t["A_hybrid"].mT) @ t["B_hybrid"].mT if self.hybrid_rank else y


register("gralora", "expansion", __doc__, GraLoRA())
