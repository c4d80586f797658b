"""MiSS: y = W0 x + expand(D) x, where D is the only trained matrix.

Its efficient form, which all its experiments run: D [out, r] times S = Σ_g x^(g), the sum over the
input's blocks of r entries each, so that expand(D) repeats D along the input. Eq. 3's own shards
repeat rows of D [r, in] along the output. Earlier versions of the paper are called Bone and DiSHA.

:summary: One trained matrix, repeated along the input: cheaper than LoRA at its rank
:equation: dW x = D (x_[1..r] + x_[r+1..2r] + ...), D0 = 0
:trap: D trains from the first step, so its gradient is far larger at the start than LoRA's.
:trap: Inputs r apart share a column: the blocks are interleaved, not contiguous.
:trap: At equal rank it has half of LoRA's parameters on a square layer.
:title: MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure
:authors: Jiale Kang, Qingyu Yin
:source: arXiv 2409.15371, 2024: eqs. 2 to 7, section 4
:verified: paper (version 12); equality with installed PEFT
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loralab.methods import register
from loralab.methods.optimization._unscaled import Unscaled
from loralab.recipe import Evidence, Site, Tensors


@dataclass(frozen=True)
class MiSS(Unscaled):
    """One small matrix, repeated; the rank is its small side (64 in the paper).

    Args:
        shards: "inputs" for the efficient form, where inputs i, i + r, i + 2r, ... share a column
            (the last block may be short, as in PEFT); "outputs" for eq. 3, where stretches of
            out / r outputs share a row.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"D"})

    shards: Literal["inputs", "outputs"] = "inputs"

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return D = 0."""
        r = site.rank
        shape = (site.d_out, r) if self.shards == "inputs" else (r, site.d_in)
        return {"D": evidence.weight.new_zeros(shape)}

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        D, r = t["D"], site.rank
        one = torch.eye(r, dtype=D.dtype, device=D.device)
        if self.shards == "inputs":
            A = one[:, torch.arange(site.d_in, device=D.device) % r]
            return D, A.expand(*D.shape[:-2], -1, -1)
        B = one[torch.arange(site.d_out, device=D.device) * r // site.d_out]
        return B.expand(*D.shape[:-2], -1, -1), D


register("miss", "optimization", __doc__, MiSS(), aliases=("bone",))
