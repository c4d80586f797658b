"""RaLoRA, "Gradient Intrinsic Dimensionality Alignment" (ICLR 2026, OpenReview kObvnQ6pUx; no arXiv
number known to us), with MELoRA's blocks (arXiv 2402.17263): dW = s diag(B_1 A_1, ..., B_n A_n).

erank(G) = exp(-Σ p ln p), p = σ / Σσ the singular values of the gradient at the base;
n = 2^⌊log2(erank(G) / r)⌋ within [1, n_max].

:summary: As many diagonal blocks as the gradient's effective rank asks for
:equation: dW = s diag(B_1 A_1, ..., B_n A_n), n = 2^floor(log2(erank(G) / r))
:trap: Every block has the full rank r: the update's rank is n r, the count LoRA's r (d_in + d_out).
:trap: Block i maps part i of the inputs to part i of the outputs and no other.
:trap: n_max is ours (32): no default is printed in what we could read.
:trap: An erank below r gives one block, which is LoRA.
:title: Gradient Intrinsic Dimensionality Alignment: Narrowing The Gap Between Low-Rank Adaptation
    and Full Fine-Tuning
:authors: Jingqi Ye, Haonan He, Minglei Li, Fujun Han, Tao Chen, Peng Ye
:source: ICLR 2026 (OpenReview kObvnQ6pUx), 2026: section 3
:verified: a public reading of the paper (papernotes, ICLR 2026) and the authors' code
    (hhnqqq/MyTransformers, ralora.py)
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from loralab.bounds import Count, OneOf
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.budgeting._evidence import adalomo_step, effective_rank, gradient_of
from loralab.methods.expansion.lora import uniform
from loralab.recipe import Evidence, Form, Site, Tensors

UPDATES = {"gradient": lambda evidence: gradient_of(evidence, "RaLoRA"), "adalomo": adalomo_step}


@dataclass(frozen=True)
class RaLoRA(Form):
    """As many diagonal blocks as align the rank with the gradient's.

    A [r, in] and B [out, r] hold all blocks side by side: block i reads part i of the inputs with
    part i of A's columns and writes part i of the outputs with part i of B's rows. So trials whose
    gradients ask for other numbers of blocks still fit in one pack.

    Args:
        n_max: the most blocks, a power of two; a layer has no more than divide its sides.
        update: which matrix has its rank measured, "gradient" or "adalomo" (see DRaLoRA).
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    frozen: ClassVar[frozenset[str]] = frozenset({"n"})
    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    layers: ClassVar[frozenset[str]] = frozenset({"Linear", "Conv1D", "Conv2d"})

    n_max: Count = 32
    update: Annotated[str, OneOf(UPDATES)] = "gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_max & (self.n_max - 1):
            raise UserError(f"n_max of RaLoRA must be a power of two, not {self.n_max}")

    def most(self, site: Site) -> int:
        """Return the most blocks that a layer can have."""
        return math.gcd(site.d_in, site.d_out, self.n_max)

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [r, in], B [out, r] = 0 and the number of blocks n [1], 1 without data."""
        most, n = self.most(site), 1
        if most > 1 and evidence.gradient is not None:
            erank = effective_rank(UPDATES[self.update](evidence))
            n = min(2 ** max(0, math.floor(math.log2(erank / site.rank))), most)
        block = site.d_in // n  # each A_i starts as LoRA's A of a layer with this many inputs
        return {
            "A": uniform(evidence, "A", site.rank, site.d_in, bound=block**-0.5),
            "B": evidence.weight.new_zeros(site.d_out, site.rank),
            "n": evidence.weight.new_full((1,), n),
        }

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


register("ralora", "budgeting", __doc__, RaLoRA())
