"""OFT: z = (R W0)ᵀ x, R = diag(R_1, ..., R_r) orthogonal by Cayley's map; COFT keeps Q_i in a ball.

The paper's W0 [in, out] is our Wᵀ: the input is turned, W (Rᵀ x). Never done on W itself, as in
OFTv2 (arXiv 2506.19847), whose Neumann series for the inverse is an option.

:summary: Turns the layer's input by a block-diagonal rotation
:equation: W' = W R^T, R = diag of (I + Q_i)(I - Q_i)^-1, Q_i = -Q_i^T, Q = 0 at the start
:trap: A truncated Neumann series is not orthogonal; the exact map is, with determinant 1.
:trap: PEFT's exact Cayley map is (I - Q)(I + Q)^-1, the inverse of its own series.
:trap: A larger rank here is a larger block; the paper's r counts blocks.
:trap: COFT's ball is the authors' code's, which grows with b²; PEFT's has no b² at the same ε.
:title: Controlling Text-to-Image Diffusion by Orthogonal Finetuning
:authors: Zeju Qiu, Weiyang Liu, Haiwen Feng, Yuxuan Xue, Yao Feng, Zhen Liu, Dan Zhang, Adrian
    Weller, Bernhard Schölkopf
:source: arXiv 2306.07280, 2023: eqs. 2 and 3, sections 3.3 to 3.5
:verified: paper and authors' code (Zeju1997/oft); equality with installed PEFT (Neumann series; its
    exact Cayley map is the transpose)
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.bounds import CountOrZero
from loralab.core.layers import wide
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.optimization._rotations import BallAdamW, Rotation, block, cayley, skew, turn
from loralab.recipe import Evidence, Site, Tensors


@dataclass(frozen=True)
class OFT(Rotation):
    """A block-diagonal rotation of the layer's input.

    The rank is the block size b = in / r, so that more is more: in (b - 1) / 2 parameters. The
    paper's own r, the number of blocks, is in / rank. A rank that does not divide `in` gives way
    to the next smaller divisor.

    Args:
        share: one R_i for all blocks (section 3.3).
        rescale: also train s, the diagonal of D in z = (R W0 D)ᵀ x (section 3.5).
        neumann: terms of the series in place of the inverse (OFTv2); 0 for the exact Cayley map.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"theta"})

    share: bool = False
    neumann: CountOrZero = 0

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return theta [in / b, b (b - 1) / 2] = 0, and s [out] = 1 if asked for."""
        n = site.d_in
        b = max(d for d in range(1, min(site.rank, n) + 1) if n % d == 0)
        if b < 2:
            raise UserError(f"OFT needs a block of at least 2 inputs; {n} has none up to its rank")
        return self.at_rest(evidence, b, 1 if self.share else n // b)

    def inner(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        R = cayley(skew(wide(t["theta"]), block(t["theta"])), self.neumann)
        return turn(x, R)


register("oft", "optimization", __doc__, OFT(), rule=BallAdamW())
