"""NoRA, arXiv 2408.10280: a LoRA nested in a frozen one, h = W0 x + s B B' A' A x.

B = U_r Σ_r and A = V_rᵀ of W0 = U Σ Vᵀ are frozen; A' [r', r] random and B' [r, r'] = 0 trained.

The paper's text could not be read: this is the abstract (outer factors from an SVD, frozen; inner
pair trained) with what its reviews quote. A later version weighs the SVD by activations; its weight
is not known to us, so it is left out. LoRAFactory's nora.py is another method: it trains all four.

:summary: A small LoRA between frozen singular vectors of the weight
:equation: dW = s U_r S_r B' A' V_r^T, U, S, V of W frozen, B'0 = 0
:trap: The rank asked for is the frozen outer one; the trained pair has half of it.
:trap: The gradient of the inner pair is weighted by W's singular values.
:trap: The update stays in the span of W's leading singular vectors.
:title: NoRA: Nested Low-Rank Adaptation for Efficient Fine-Tuning Large Models
:authors: Cheng Lin, Lujun Li, Dezhi Li, Jie Zou, Wei Xue, Yike Guo
:source: arXiv 2408.10280, 2024: our reading of the abstract
:verified: our reading of the abstract and of the public reviews; the text was not to be had
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class NoRA(Form):
    """A pair of rank r' between frozen singular vectors of rank r.

    Args:
        inner_rank: r'; None for half of the site's rank, at least 1 (our choice).
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A_inner", "B_inner"})
    frozen: ClassVar[frozenset[str]] = frozenset({"A_outer", "B_outer"})

    inner_rank: int | None = None

    def __post_init__(self) -> None:
        if self.inner_rank is not None and not self.inner_rank >= 1:
            raise UserError(f"inner_rank of NoRA must be at least 1, not {self.inner_rank!r}")

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return the frozen triplets and LoRA's start for the inner pair."""
        r = site.rank
        inner = self.inner_rank or max(1, r // 2)
        U, S, Vh = torch.linalg.svd(evidence.weight, full_matrices=False)
        return {
            "A_outer": Vh[:r].contiguous(),
            "B_outer": U[:, :r] * S[:r],
            "A_inner": uniform(evidence, "A_inner", inner, r, bound=r**-0.5),
            "B_inner": evidence.weight.new_zeros(r, inner),
        }

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return t["B_outer"] @ t["B_inner"], t["A_inner"] @ t["A_outer"]


register("nora", "initialization", __doc__, NoRA())
