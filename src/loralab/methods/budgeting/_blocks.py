"""dW = s diag(B_1 A_1, ..., B_n A_n) (MELoRA, arXiv 2402.17263), where every trial has its own n.

A [r, in] and B [out, r] hold all blocks side by side: block i reads part i of the inputs with part
i of A's columns and writes part i of the outputs with part i of B's rows. So trials with other
numbers of blocks still fit in one pack.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import Count
from loralab.errors import UserError
from loralab.recipe import Form, Site, Tensors


@dataclass(frozen=True)
class DiagonalBlocks(Form):
    """Base of forms with A, B and the number of blocks n [1], a power of two.

    Args:
        n_max: the most blocks, a power of two; a layer has no more than divide its sides.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    frozen: ClassVar[frozenset[str]] = frozenset({"n"})
    layers: ClassVar[frozenset[str]] = frozenset({"Linear", "Conv1D", "Conv2d"})

    n_max: Count = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_max & (self.n_max - 1):
            name = type(self).__name__
            raise UserError(f"n_max of {name} must be a power of two, not {self.n_max}")

    def most(self, site: Site) -> int:
        """Return the most blocks that a layer can have."""
        return math.gcd(site.d_in, site.d_out, self.n_max)

    def together(self, t: Tensors, parts: int) -> Tensor:
        """Return [*, parts, parts], 1 where two equal parts of a side lie in one block, else 0."""
        n = t["n"].to(torch.promote_types(t["n"].dtype, torch.float32))  # counts need many digits
        block = (torch.arange(parts, device=n.device) * n / parts).floor()
        return (block.unsqueeze(-1) == block.unsqueeze(-2)).to(t["A"])

    def delta(self, t: Tensors, site: Site) -> Tensor:
        parts = self.most(site)
        D = (t["B"] @ t["A"]).unflatten(-1, (parts, -1)).unflatten(-3, (parts, -1))
        return (D * self.together(t, parts)[..., :, None, :, None]).flatten(-2).flatten(-3, -2)

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        parts = self.most(site)
        if parts == 1:
            return (x @ t["A"].mT) @ t["B"].mT
        A = t["A"].mT.unflatten(-2, (parts, -1))  # [part, in / parts, r]
        B = t["B"].unflatten(-2, (parts, -1)).mT  # [part, r, out / parts]
        h = x.unflatten(-1, (parts, -1)).transpose(-3, -2) @ A  # [part, tokens, r]
        h = (self.together(t, parts) @ h.flatten(-2)).unflatten(-1, h.shape[-2:])
        return (h @ B).transpose(-3, -2).flatten(-2)
