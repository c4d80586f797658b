"""WaveFT, arXiv 2505.12532: dW = λ IDWT(S), S with n trained entries at random places, else 0.

One level of the two-dimensional Haar transform (db1, the authors' default and the only one here):
each 2 x 2 block of dW comes from one entry of each of S's four quadrants.

:summary: A few trained coefficients of the update's wavelet transform
:equation: dW = alpha IDWT(S), S = c at n random entries and 0 elsewhere
:trap: alpha is the whole scale: it is not divided by a rank, and the rank has no effect.
:trap: Sizes that are odd are padded by one before the transform and cut after it.
:title: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets
:authors: Ahmet Bilican, M. Akın Yılmaz, A. Murat Tekalp, R. Gökberk Cinbiş
:source: arXiv 2505.12532, 2025: section 3, dW = lambda IDWT(S)
:verified: equality with installed PEFT, which is the authors' code; the paper's text was not to be
    had
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.fourierft import entries_seed, random_entries, to_dense
from loralab.recipe import LAYERS, Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class WaveFT(Form):
    """Sparse wavelet coefficients.

    Args:
        n: coefficients per layer, at most as many as it has weights.
        idwt: False leaves the transform out: a sparse dW, the authors' cheaper ablation.
        loc_seed: seed of the entries' places; None takes it from the trial's seed.
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"entries"})
    any_rank: ClassVar[bool] = True
    layers: ClassVar[frozenset[str]] = LAYERS - {"Embedding"}

    n: int = 2592
    idwt: bool = True
    loc_seed: int | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"n of WaveFT must be at least 1, not {self.n}")

    def default_alpha(self, rank: int) -> float:
        """Return the authors' 25."""
        return 25.0

    def scale(self, alpha: float, rank: int) -> float:
        return alpha

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return c [n] = 0 and the frozen positions [n]."""
        seed = entries_seed("waveft", evidence.seed) if self.loc_seed is None else self.loc_seed
        entries = random_entries(self.n, site.d_out, site.d_in, seed).to(evidence.weight.device)
        return {"c": evidence.weight.new_zeros(entries.shape), "entries": entries}

    def delta(self, t: Tensors, site: Site) -> Tensor:
        S = to_dense(t["c"], t["entries"], site.d_out, site.d_in)
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
