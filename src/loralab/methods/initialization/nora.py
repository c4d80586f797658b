"""NoRA, arXiv 2408.10280: a LoRA nested in a frozen one, h = W0 x + s B B' A' A x.

B = U_r Σ_r and A = V_rᵀ of W0 = U Σ Vᵀ are frozen; A' [r', r] random and B' [r, r'] = 0 trained.

This is the abstract with what its reviews quote. The published version (Efficient Fine-Tuning of
Large Models via Nested Low-Rank Adaptation, ICCV 2025) takes the SVD of W0 S, S = diag(√mean x_j²)
of the layer's inputs, and A = V_rᵀ S⁻¹: `activation`. The authors' code is a set of ablations of
it: S is mean |x_j|, Σ goes to B, to A or half to each, A' and B' both start at random, and r' = 16
inside r = 0.8 min(in, out). LoRAFactory's nora.py is another method: it trains all four.

:summary: A small LoRA between frozen singular vectors of the weight
:equation: dW = s U_r S_r B' A' V_r^T, U, S, V of W frozen, B'0 = 0
:trap: The rank asked for is the frozen outer one; the trained pair has half of it.
:trap: The gradient of the inner pair is weighted by W's singular values.
:trap: The update stays in the span of W's leading singular vectors.
:trap: The authors' code starts A' and B' both at random, and so away from the base.
:title: NoRA: Nested Low-Rank Adaptation for Efficient Fine-Tuning Large Models
:authors: Cheng Lin, Lujun Li, Dezhi Li, Jie Zou, Wei Xue, Yike Guo
:source: arXiv 2408.10280, 2024: our reading of the abstract
:verified: abstract and reviews, and the authors' code (lliai/LoRA-Zoo, nora/loralib/lora_lib.py and
    lora.py) for the frozen outer and serial inner pair; there the SVD is weighted by activations
    and both inner factors start at random; the text was not to be had
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import Count
from loralab.methods import register
from loralab.methods.budgeting.eva import covariance_of
from loralab.methods.expansion.lora import uniform
from loralab.methods.initialization._svd import leading_triplets
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class NoRA(Form):
    """A pair of rank r' between frozen singular vectors of rank r.

    Args:
        inner_rank: r'; None for half of the site's rank, at least 1 (our choice).
        activation: weigh the SVD by the layer's inputs, as the published version does.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A_inner", "B_inner"})
    frozen: ClassVar[frozenset[str]] = frozenset({"A_outer", "B_outer"})

    inner_rank: Count | None = None
    activation: bool = False

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Weighing looks at the inputs."""
        return frozenset({"covariance"} if self.activation else ())

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return the frozen triplets and LoRA's start for the inner pair."""
        W, r = evidence.weight, site.rank
        inner = self.inner_rank or max(1, r // 2)
        size = W.new_ones(site.d_in)  # the diagonal of S
        if self.activation:
            size = covariance_of(evidence, "NoRA").diagonal().sqrt().to(W)
            # An input that is nearly always 0 would have A blow up (our choice of a floor).
            size = size.clamp_min(1e-3 * size.mean().item()).clamp_min(torch.finfo(W.dtype).tiny)
        U, S, Vh = leading_triplets(W * size, r)
        return {
            "A_outer": Vh / size,
            "B_outer": U * S,
            "A_inner": uniform(evidence, "A_inner", inner, r, bound=r**-0.5),
            "B_inner": W.new_zeros(r, inner),
        }

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return t["B_outer"] @ t["B_inner"], t["A_inner"] @ t["A_outer"]


register("nora", "initialization", __doc__, NoRA())
