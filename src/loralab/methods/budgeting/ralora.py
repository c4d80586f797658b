"""RaLoRA (no arXiv number known to us): MELoRA's blocks, dW = s diag(B_1 A_1, ..., B_n A_n), where
n follows from the gradient (`_blocks.py`).

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

from loralab.bounds import OneOf
from loralab.methods import register
from loralab.methods.budgeting._blocks import DiagonalBlocks
from loralab.methods.budgeting._evidence import adalomo_step, effective_rank, gradient_of
from loralab.methods.expansion.lora import uniform
from loralab.recipe import Evidence, Site, Tensors

UPDATES = {"gradient": lambda evidence: gradient_of(evidence, "RaLoRA"), "adalomo": adalomo_step}


@dataclass(frozen=True)
class RaLoRA(DiagonalBlocks):
    """As many diagonal blocks as align the rank with the gradient's.

    Args:
        update: which matrix has its rank measured, "gradient" or "adalomo" (see DRaLoRA).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    update: Annotated[str, OneOf(UPDATES)] = "gradient"

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


register("ralora", "budgeting", __doc__, RaLoRA())
