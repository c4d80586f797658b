"""PRoLoRA: A = [A^u; A^s], A^s = [A_0, Roll(A_0, s_A), ..., Roll(A_0, (m - 1) s_A)], B alike.

s_A = max(⌊(r - u) / m⌋, 1), and B has n chunks. Of r ranks, u are plain. The others are one trained
chunk repeated along the hidden dimension, each copy rotated further along the ranks, so that no two
stretches see the same directions.

:summary: Within one adapter, rotated copies of a small chunk beside a few plain ranks
:equation: A = [A_u; roll(A_0, i s_A) for i < m], B alike; dW = (alpha / r) B A
:trap: The copies lie along the hidden dimension and are rotated along the ranks.
:trap: The chunk's "rectified" start is bounded by all the layer's inputs, not by the chunk's own.
:title: PRoLoRA: Partial Rotation Empowers More Parameter-Efficient LoRA
:authors: Sheng Wang, Boyang Xue, Jiacheng Ye, Jiyue Jiang, Liheng Chen, Lingpeng Kong, Chuan Wu
:source: arXiv 2402.16902, 2024: eqs. 4 and 5, section 3.1
:verified: paper (section 3.1); authors' code (Forence1999/PRoLoRA, chunkwise_sharing_LoRA.py); u, m
    and n are arguments there, the defaults are LoRAFactory's
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loralab.bounds import Count, CountOrZero
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class PRoLoRA(Form):
    """Rotated copies of a chunk beside plain ranks.

    Args:
        unshared: u, plain ranks; below the rank.
        m, n: chunks that the hidden dimensions of A and B are made of.
        rotate: what is rotated: "rank" (the paper and its code) or "hidden", each chunk along its
            own hidden dimension by ⌊chunk / m⌋ (LoRAFactory).
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "A0", "B0"})

    unshared: CountOrZero = 1
    m: Count = 2
    n: Count = 2
    rotate: Literal["rank", "hidden"] = "rank"

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A0 [r - u, in / m], B0 [out / n, r - u] = 0, and A [u, in], B [out, u] = 0."""
        if self.unshared >= site.rank:
            raise UserError(
                f"PRoLoRA leaves {self.unshared} ranks unshared and shares the others, so its "
                f"rank exceeds that; it is {site.rank}"
            )
        u, q, zeros = self.unshared, site.rank - self.unshared, evidence.weight.new_zeros
        bound = site.d_in**-0.5
        A0 = uniform(evidence, "A0", q, -(-site.d_in // self.m), bound=bound)
        t = {"A0": A0, "B0": zeros(-(-site.d_out // self.n), q)}
        if u:
            A = uniform(evidence, "A", u, site.d_in, bound=bound)
            t |= {"A": A, "B": zeros(site.d_out, u)}
        return t

    def _spread(self, chunk: Tensor, copies: int, width: int) -> Tensor:
        """Return the rotated copies of chunk [*, q, c] side by side, [*, q, width]."""
        axis, sign = (-2, -1) if self.rotate == "rank" else (-1, 1)
        # Along the ranks, copy i is read from row i s_A on.
        stride = sign * max(chunk.shape[axis] // copies, 1)
        return torch.cat([chunk.roll(i * stride, axis) for i in range(copies)], -1)[..., :width]

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        A = self._spread(t["A0"], self.m, site.d_in)
        B = self._spread(t["B0"].mT, self.n, site.d_out).mT
        if self.unshared:
            A, B = torch.cat([A, t["A"]], -2), torch.cat([B, t["B"]], -1)
        return B, A


register("prolora", "sharing", __doc__, PRoLoRA())
