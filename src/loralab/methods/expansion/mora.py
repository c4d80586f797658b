"""MoRA: h = W0 x + f_decomp(M f_comp(x)), M square with r̂ = ⌊√((in + out) r)⌋.

"rotate" (eq. 9): x is cut into pieces of r̂, piece i is turned by the rotary angles of position i,
M acts on each and the results stand side by side. "share" (eq. 6): the pieces are added up, and M's
result is repeated. The last piece is filled up from the beginning of x; outputs too few for the
layer are repeated, too many are cut off.

:summary: One square matrix between fixed compression and decompression: high rank at LoRA's count
:equation: dW x = f_decomp(M f_comp(x)), M of side floor(sqrt((in + out) r)), M = 0
:trap: Alpha has no effect, and the rank only sets the side of M.
:trap: For rotations the side is made even, so up to 2 r̂ parameters fewer than LoRA's.
:title: MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning
:authors: Ting Jiang, Shaohan Huang, Shengyue Luo, Zihan Zhang, Haizhen Huang, Furu Wei, Weiwei
    Deng, Feng Sun, Qi Zhang, Deqing Wang, Fuzhen Zhuang
:source: arXiv 2405.12130, 2024: eqs. 6 and 9
:verified: paper (section 4) and authors' code (kongds/MoRA, tuners/lora/layer.py), types 1 and 6
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loralab.methods import register
from loralab.methods.expansion._rotary import rotated
from loralab.recipe import LAYERS, Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class MoRA(Form):
    """One square matrix.

    Args:
        operator: "rotate", the authors' choice for small ranks, or "share", for large ones.
        nearest: round r̂ to the nearest integer as the authors' code does; the paper rounds down.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"M"})
    layers: ClassVar[frozenset[str]] = LAYERS - {"Embedding"}

    operator: Literal["rotate", "share"] = "rotate"
    nearest: bool = False

    def scale(self, alpha: float, rank: int) -> float:
        """Return 1: MoRA has no alpha."""
        return 1.0

    def side(self, site: Site) -> int:
        """Return r̂; rotations need it even."""
        side = math.sqrt((site.d_in + site.d_out) * site.rank)
        whole = int(side + 0.5) if self.nearest else math.floor(side)
        return whole // 2 * 2 if self.operator == "rotate" else whole

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return M [r̂, r̂] = 0."""
        return {"M": evidence.weight.new_zeros(self.side(site), self.side(site))}

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        M, side = t["M"], t["M"].shape[-1]
        n = -(-site.d_in // side)  # pieces
        if n * side > site.d_in:
            x = x[..., torch.arange(n * side, device=x.device) % site.d_in]
        pieces = x.unflatten(-1, (n, side))  # [*, tokens, n, r̂]
        if self.operator == "share":
            y = pieces.sum(-2) @ M.mT
        else:
            y = (rotated(pieces).flatten(-3, -2) @ M.mT).unflatten(-2, (-1, n)).flatten(-2)
        if y.shape[-1] < site.d_out:
            y = torch.cat([y] * -(-site.d_out // y.shape[-1]), -1)
        return y[..., : site.d_out]

    def delta(self, t: Tensors, site: Site) -> Tensor:
        M = t["M"]
        one = torch.eye(site.d_in, dtype=M.dtype, device=M.device)
        return self.branch(t, one.expand(*M.shape[:-2], -1, -1), site).mT


register("mora", "expansion", __doc__, MoRA())
