"""BOFT: z = (R W0)ᵀ x, R = B̃(d, 2^m) B̃(d, 2^{m-1}) ... B̃(d, 2).

The butterfly component B̃(d, k) couples sub-blocks of b/2 inputs that lie k/2 apart in groups of
k: a block-diagonal rotation of b x b blocks (Cayley, as in OFT) between two permutations.
BOFT(1, b) is OFT with block size b; m = log2(2d/b) makes R dense.

:summary: Turns the layer's input by a product of butterfly rotations
:equation: W' = W R^T, R = B(d, 2^m) ... B(d, 2), each a permuted block-diagonal rotation
:trap: Without a permutation between them, m block-diagonal factors are one block-diagonal.
:trap: PEFT sets m to 1 without its CUDA extension, whatever was asked for.
:trap: b counts inputs of a rotated block; the paper's sub-blocks are b/2 wide.
:title: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization
:authors: Weiyang Liu, Zeju Qiu, Yao Feng, Yuliang Xiu, Yuxuan Xue, Longhui Yu, Haiwen Feng, Zhen
    Liu, Juyeon Heo, Songyou Peng, Yandong Wen, Michael J. Black, Adrian Weller, Bernhard Schölkopf
:source: arXiv 2311.06243, 2023: section 4, eqs. 1 and 2
:verified: paper; equality with installed PEFT (m = 1, its Cayley map transposed) and with its
    permutations (m > 1)
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.bounds import Count
from loralab.core.layers import wide
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.optimization._rotations import Rotation, butterfly, cayley, skew
from loralab.recipe import Evidence, Site, Tensors


@dataclass(frozen=True)
class BOFT(Rotation):
    """A product of m butterfly rotations of the layer's input.

    The rank is the block size b, of the paper's BOFT(m, b): m in (b - 1) / 2 parameters. A rank
    that does not fit `in` gives way to the next smaller even divisor.

    Args:
        n_factors: m; 2 in most of the paper's tables.
        rescale: off in the paper, on in the authors' code and in PEFT.
    """

    recomputed: ClassVar[frozenset[str]] = frozenset({"inner"})  # m turned copies of x

    n_factors: Count = 2

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return theta [m, in / b, b (b - 1) / 2] = 0, and s [out] = 1 if asked for."""
        n, m = site.d_in, self.n_factors
        fits = [b for b in range(2, min(site.rank, n) + 1, 2) if n % (b * 2 ** (m - 1)) == 0]
        if not fits:
            raise UserError(
                f"BOFT with {m} factors needs an even block b up to the rank {site.rank} such that "
                f"{2 ** (m - 1)} b divides the {n} inputs; choose another rank or fewer n_factors"
            )
        return self.at_rest(evidence, fits[-1], m, n // fits[-1])

    def blocks(self, t: Tensors, site: Site) -> Tensor:
        """Return R's blocks [*, m, in / b, b, b]; the first belong to B̃(d, 2)."""
        theta = wide(t["theta"])
        return cayley(skew(theta, site.d_in // theta.shape[-2]))

    def inner(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        R = self.blocks(t, site)
        for i in range(self.n_factors, 0, -1):
            x = butterfly(x, R[..., i - 1, :, :, :], 2**i)
        return x

    def base(self, t: Tensors, W: Tensor, site: Site) -> Tensor:
        R = self.blocks(t, site).mT
        for i in range(1, self.n_factors + 1):
            W = butterfly(W, R[..., i - 1, :, :, :], 2**i)
        return self.outer(t, W.mT, site).mT


register("boft", "optimization", __doc__, BOFT())
