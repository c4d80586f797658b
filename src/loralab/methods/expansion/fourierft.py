"""FourierFT: dW = α Re(IDFT2(F)), F = ToDense(E, c), the coefficients c at the frequencies E.

E is the same in all layers (here: of one size). The inverse transform divides by the number of
entries, as in the paper's algorithm 1 and unlike its eq. 3.

:summary: A few trained coefficients of the update's two-dimensional Fourier transform
:equation: dW = alpha Re(ifft2(F)), F = c at n random frequencies and 0 elsewhere
:trap: alpha is the whole scale: it is not divided by a rank, and the rank has no effect.
:trap: The normalised inverse transform makes dW tiny, hence alpha = 300.
:trap: The paper's start, c ~ N(0, 1), is 300 sqrt(n / 2) / (in out) off the base per weight: 4e-4
    at 4096 x 4096, but 1.6 at 64 x 64, where nothing was learnt (0 %; 78 % by init_c="zero").
:trap: The frequencies are drawn from the trial's seed; PEFT's from a seed of their own.
:title: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform
:authors: Ziqi Gao, Qichao Wang, Aochuan Chen, Zijing Liu, Bingzhe Wu, Liang Chen, Jia Li
:source: arXiv 2405.03003, 2024: eqs. 2 to 4, algorithm 1
:verified: paper and equality with installed PEFT
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loralab.bounds import Count
from loralab.methods import register
from loralab.methods.expansion._sparse import SparseForm
from loralab.methods.expansion.lora import normal
from loralab.recipe import Evidence, Site, Tensors


@dataclass(frozen=True)
class FourierFT(SparseForm):
    """A sparse spectrum; n = 1000 for LLaMA in the paper.

    Args:
        init_c: the paper's "normal", c ~ N(0, 1), off the base, or "zero". dW is linear in c, so
            the two differ by the first dW and by nothing else.
    """

    method: ClassVar[str] = "fourierft"

    n: Count = 1000
    init_c: Literal["normal", "zero"] = "normal"

    @property
    def departs(self) -> bool:
        return self.init_c == "normal"

    def default_alpha(self, rank: int) -> float:
        """Return the paper's 300 for instruction tuning and images; 150 in PEFT."""
        return 300.0

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        t = super().init(site, evidence)
        if self.init_c == "normal":
            t["c"] = normal(evidence, "c", *t["c"].shape, std=1.0)
        return t

    def delta(self, t: Tensors, site: Site) -> Tensor:
        return torch.fft.ifft2(self.spread(t, site)).real


register("fourierft", "expansion", __doc__, FourierFT())
