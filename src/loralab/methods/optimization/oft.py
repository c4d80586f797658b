"""OFT: z = (R W0)ᵀ x, R = diag(R_1, ..., R_r) orthogonal, R_i = (I + Q_i)(I - Q_i)⁻¹ with
Q_i = -Q_iᵀ (Cayley, section 3.3), Q = 0 at the start; COFT keeps every Q_i in a ball (section 3.4).

The paper's W0 [in, out] is our Wᵀ: the input is turned, W (Rᵀ x). Never done on W itself, as in
OFTv2 (arXiv 2506.19847), whose Neumann series for the inverse is an option.

:summary: Turns the layer's input by a block-diagonal rotation
:equation: W' = W R^T, R = diag of (I + Q_i)(I - Q_i)^-1, Q_i = -Q_i^T
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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.bounds import CountOrZero, Positive
from loralab.core.layers import wide
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.optimization._rotations import block, cayley, skew, turn
from loralab.recipe import Evidence, Form, Hyper, Site, SiteState, Tensors
from loralab.training.adamw import AdamW


@dataclass(frozen=True)
class OFT(Form):
    """A block-diagonal rotation of the layer's input.

    The rank is the block size b = in / r, so that more is more: in (b - 1) / 2 parameters. The
    paper's own r, the number of blocks, is in / rank. A rank that does not divide `in` gives way
    to the next smaller divisor.

    Args:
        share: one R_i for all blocks (section 3.3).
        rescale: also train a factor per output, z = (R W0 D)ᵀ x (section 3.5).
        neumann: terms of the series in place of the inverse (OFTv2); 0 for the exact Cayley map.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"theta"})
    layers: ClassVar[frozenset[str]] = frozenset({"Linear", "Conv1D", "Conv2d"})
    any_rank: ClassVar[bool] = True

    share: bool = False
    rescale: bool = False
    neumann: CountOrZero = 0

    def scale(self, alpha: float, rank: int) -> float:
        return 1.0

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return theta [in / b, b (b - 1) / 2] = 0, and s [out] = 1 if asked for."""
        n = site.d_in
        b = max(d for d in range(1, min(site.rank, n) + 1) if n % d == 0)
        if b < 2:
            raise UserError(f"OFT needs a block of at least 2 inputs; {n} has none up to its rank")
        t = {"theta": evidence.weight.new_zeros(1 if self.share else n // b, b * (b - 1) // 2)}
        return t | ({"s": evidence.weight.new_ones(site.d_out)} if self.rescale else {})

    def inner(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        R = cayley(skew(wide(t["theta"]), block(t["theta"])), self.neumann)
        return turn(x, R)

    def outer(self, t: Tensors, y: Tensor, site: Site) -> Tensor:
        return (y * t["s"].unsqueeze(-2)).to(y.dtype) if self.rescale else y


@dataclass(frozen=True)
class BallAdamW(AdamW):
    """AdamW, then the projection of every Q_i on ‖Q_i‖_F ≤ ε b² / √(number of blocks).

    Args:
        coft: ε; the authors' DreamBooth script has 6e-5. None leaves Q free, which is OFT.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"theta"})

    coft: Positive | None = None

    def step(self, sites: Sequence[SiteState], hyper: Hyper) -> None:
        super().step(sites, hyper)
        if self.coft is None:
            return
        for theta in (site.t["theta"] for site in sites):
            radius = self.coft * block(theta) ** 2 / theta.shape[-2] ** 0.5
            norm = 2**0.5 * theta.norm(dim=-1, keepdim=True)  # of Q, which has every entry twice
            theta.mul_((radius / norm.clamp_min(1e-30)).clamp_max(1.0))


register("oft", "optimization", __doc__, OFT(), rule=BallAdamW())
