"""FourierFT, arXiv 2405.03003, eqs. 2 to 4: dW = α Re(IDFT2(F)), F = ToDense(E, c).

The n trained coefficients c stand at n random frequencies E; the rest of F is 0. E is the same in
all layers (here: of one size). The inverse transform divides by the number of entries, as in the
paper's algorithm 1 and unlike its eq. 3.

:summary: A few trained coefficients of the update's two-dimensional Fourier transform
:equation: dW = alpha Re(ifft2(F)), F = c at n random frequencies and 0 elsewhere
:trap: alpha is the whole scale: it is not divided by a rank, and the rank has no effect.
:trap: The normalised inverse transform makes dW tiny, hence alpha = 300.
:trap: The frequencies are drawn from the trial's seed; PEFT's from a seed of their own.
:title: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform
:authors: Ziqi Gao, Qichao Wang, Aochuan Chen, Zijing Liu, Bingzhe Wu, Liang Chen, Jia Li
:source: arXiv 2405.03003, 2024: eqs. 2 to 4, algorithm 1
:verified: paper and equality with installed PEFT
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.recipe import LAYERS, Evidence, Form, Site, Tensors
from loralab.seeds import stable_seed


def entries_seed(method: str, seed: int) -> int:
    """Return the seed of the random entries in the trial of this seed; PEFT's random_loc_seed."""
    return stable_seed(seed, method, "entries")


def random_entries(n: int, m: int, d: int, seed: int) -> Tensor:
    """Return n distinct flat positions in [m, d], drawn as in PEFT: one seed for all sizes."""
    return torch.randperm(m * d, generator=torch.Generator().manual_seed(seed))[:n]


def to_dense(c: Tensor, entries: Tensor, m: int, n: int) -> Tensor:
    """Return [*, m, n] with c [*, k] at the flat positions `entries` [*, k] and 0 elsewhere."""
    zeros = c.new_zeros(*c.shape[:-1], m * n)
    return zeros.scatter(-1, entries.expand(c.shape), c).unflatten(-1, (m, n))


@dataclass(frozen=True)
class FourierFT(Form):
    """A sparse spectrum.

    Args:
        n: coefficients per layer, at most as many as it has weights; 1000 for LLaMA in the paper.
        init_c: "zero" or the paper's "normal", c ~ N(0, 1), which does not start at the base. dW is
            linear in c, so zero is what anchoring any other start would give.
        loc_seed: seed of the frequencies; None takes it from the trial's seed.
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"entries"})
    any_rank: ClassVar[bool] = True
    layers: ClassVar[frozenset[str]] = LAYERS - {"Embedding"}

    n: int = 1000
    init_c: str = "zero"
    loc_seed: int | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"n of FourierFT must be at least 1, not {self.n}")
        if self.init_c not in ("zero", "normal"):
            raise UserError(f"init_c of FourierFT is 'zero' or 'normal', not {self.init_c!r}")

    def default_alpha(self, rank: int) -> float:
        """Return the paper's 300 for instruction tuning and images; 150 in PEFT."""
        return 300.0

    def scale(self, alpha: float, rank: int) -> float:
        return alpha

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return c [n] and the frozen positions [n]."""
        seed = entries_seed("fourierft", evidence.seed) if self.loc_seed is None else self.loc_seed
        entries = random_entries(self.n, site.d_out, site.d_in, seed).to(evidence.weight.device)
        c = evidence.weight.new_zeros(entries.shape)
        if self.init_c == "normal":
            g = evidence.generator("c")
            c = torch.randn(c.shape, generator=g, dtype=torch.float64).to(evidence.weight)
        return {"c": c, "entries": entries}

    def delta(self, t: Tensors, site: Site) -> Tensor:
        F = to_dense(t["c"], t["entries"], site.d_out, site.d_in)
        return torch.fft.ifft2(F).real


register("fourierft", "expansion", __doc__, FourierFT())
