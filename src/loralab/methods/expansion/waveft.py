"""WaveFT: dW = λ IDWT(S), S with n trained entries at random places, else 0.

One level of the two-dimensional Haar transform (db1, the authors' default and the only one here):
each 2 x 2 block of dW comes from one entry of each of S's four quadrants.

:summary: A few trained coefficients of the update's wavelet transform
:equation: dW = alpha IDWT(S), S = c at n random entries and 0 elsewhere
:trap: alpha is the whole scale: it is not divided by a rank, and the rank has no effect.
:trap: The paper's alpha of 25 goes with a learning rate of 1e-4 (section 5.1).
:trap: Sizes that are odd are padded by one before the transform and cut after it.
:title: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets
:authors: Ahmet Bilican, M. Akın Yılmaz, A. Murat Tekalp, R. Gökberk Cinbiş
:source: arXiv 2505.12532, 2025: section 3, dW = lambda IDWT(S)
:verified: equality with installed PEFT, which is the authors' code; a third party cites section 5.1
    for lambda = 25; the paper's text was not to be had
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import Count
from loralab.methods import register
from loralab.methods.expansion._sparse import SparseForm
from loralab.recipe import Site, Tensors


@dataclass(frozen=True)
class WaveFT(SparseForm):
    """Sparse wavelet coefficients.

    Args:
        n: trained entries; PEFT's default (the authors' code), whether the paper's is unknown.
        idwt: False leaves the transform out: a sparse dW, the authors' cheaper ablation.
    """

    method: ClassVar[str] = "waveft"

    n: Count = 2592
    idwt: bool = True

    def default_alpha(self, rank: int) -> float:
        """Return the authors' 25."""
        return 25.0

    def delta(self, t: Tensors, site: Site) -> Tensor:
        S = self.spread(t, site)
        if not self.idwt:
            return S
        S = torch.nn.functional.pad(S, (0, site.d_in % 2, 0, site.d_out % 2))
        top, bottom = S.chunk(2, -2)
        # Low-pass; high-pass along the rows' index; along the columns' index; along both.
        (ll, hl), (lh, hh) = top.chunk(2, -1), bottom.chunk(2, -1)
        rows = [
            torch.stack([even + odd, even - odd], -1).flatten(-2)
            for even, odd in ((ll + hl, lh + hh), (ll - hl, lh - hh))
        ]
        D = torch.stack(rows, -2).flatten(-3, -2) / 2
        return D[..., : site.d_out, : site.d_in]


register("waveft", "expansion", __doc__, WaveFT())
