"""C3A: dW = C_blk(Δw), a grid of circulant b x b blocks: (Δw ⋆ x)_t = Σ_l Δw_l x_{t+l}, by FFT.

:summary: Block-circulant update: full rank from in·out/b numbers, applied by FFT
:equation: dW = C_blk(w) / in, block (i, j) circulant with first row w_ij
:trap: The rank asked for has no effect; the block size b sets the number of parameters.
:trap: Divided by the number of inputs, it needs large rates: 0.05 to 7 in the paper.
:trap: Column index minus row index: the transposed circulant is another model.
:trap: The gradient for x takes the transposed circulant; PEFT's backward does not.
:title: Parameter-Efficient Fine-Tuning via Circular Convolution
:authors: Aochuan Chen, Jiashun Cheng, Zijing Liu, Ziqi Gao, Fugee Tsung, Yu Li, Jia Li
:source: arXiv 2407.19342, 2024: section 3.4, eqs. 1, 3 and 4, algorithm A1
:verified: paper; equality with installed PEFT (the authors' code), the kernel's gradient included
"""

from dataclasses import dataclass
from math import gcd
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loralab.bounds import Count
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.recipe import LAYERS, Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class C3A(Form):
    """Block-circular convolution.

    Args:
        block: b, a common divisor of inputs and outputs; None for the greatest.
        divide: divide by the number of inputs (eq. 1 and the authors' code); False for eqs. 3, 4.
        init_w: the paper's "xavier", off the base, or "zero", what anchoring makes of any start.
    """

    any_rank: ClassVar[bool] = True
    layers: ClassVar[frozenset[str]] = LAYERS - {"Embedding"}
    recomputed: ClassVar[frozenset[str]] = frozenset({"branch"})  # spectra as wide as x and y
    block: Count | None = None
    divide: bool = True
    init_w: Literal["xavier", "zero"] = "xavier"

    @property
    def departs(self) -> bool:
        return self.init_w == "xavier"

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return w [out/b, in/b, b]; a UserError if b does not divide inputs and outputs."""
        m, n, b = site.d_out, site.d_in, self.block or gcd(site.d_out, site.d_in)
        if m % b or n % b:
            raise UserError(
                f"C3A with block = {b} cannot adapt {site.name}: its {n} inputs and {m} outputs "
                "must both be multiples; choose another block or leave the layer out"
            )
        if self.init_w == "zero":
            return {"w": evidence.weight.new_zeros(m // b, n // b, b)}
        return {"w": uniform(evidence, "w", m // b, n // b, b, bound=(6 / (m + n)) ** 0.5)}

    def scaled(self, t: Tensors, site: Site) -> Tensor:
        """Return Δw with the division taken in."""
        return t["w"] / site.d_in if self.divide else t["w"]

    def delta(self, t: Tensors, site: Site) -> Tensor:
        w = self.scaled(t, site)
        k = torch.arange(w.shape[-1], device=w.device)
        blocks = w[..., (k - k[:, None]) % w.shape[-1]]  # [.., i, j, row, column]
        return blocks.transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        w = self.scaled(t, site)
        b, wide = w.shape[-1], torch.promote_types(x.dtype, torch.float32)  # no FFT in bf16
        X = torch.fft.rfft(x.to(wide).unflatten(-1, (-1, b)))
        Y = torch.einsum("...njf,...ijf->...nif", X, torch.fft.rfft(w.to(wide)).conj())
        return torch.fft.irfft(Y, n=b).flatten(-2).to(x.dtype)


register("c3a", "expansion", __doc__, C3A())
