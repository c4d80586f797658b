"""LoRA-One, arXiv 2502.01235, algorithm 1: -∇W = U S Vᵀ, S ← S / S_1, A0 = √γ U_r S_r^½ and
B0 = √γ S_r^½ V_rᵀ with γ one over a scaling parameter (128): a rank-r step down the gradient.

The paper's A is our B and the reverse. It starts at W + s A0 B0, one step of full fine-tuning
ahead of the base; with `anchored=True` it starts at the base and keeps the directions only.

:summary: Starts from the leading singular triplets of the negative gradient
:equation: -G = U S V^T, B0 = U_r sqrt(S_r / (S_1 g)), A0 = sqrt(S_r / (S_1 g)) V_r^T
:trap: The minus sign counts: the start is a step down the gradient, not up.
:trap: Unlike LoRA-GA both factors take the first r triplets.
:trap: The preconditioned variant is rule='rplora'.
:title: LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models,
    Provably and Efficiently
:authors: Yuanhe Zhang, Fanghui Liu, Yudong Chen
:source: arXiv 2502.01235, 2025: algorithm 1
:verified: the paper's algorithm 1 and the authors' code (YuanheZ/LoRA-One, run_exp.py)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from loralab.bounds import CountOrZero, Positive
from loralab.methods import register
from loralab.methods.budgeting.gora import gradient_of
from loralab.methods.initialization._svd import split_triplets, triplets
from loralab.methods.optimization.rslora import RSLORA_FORM
from loralab.recipe import Evidence, Site, Start, Tensors


@dataclass(frozen=True)
class LoRAOne(Start):
    """Leading singular triplets of the negative gradient at the base.

    Args:
        gamma: the scaling parameter 1/γ; larger starts smaller.
        normalise: divide the singular values by the first one; False is the paper's earlier rule.
        anchored: subtract s B0 A0, so that step 0 is the base; the paper does not.
        niter: power iterations of the fast SVD with a sketch of 4r, as in the authors' code; None
            for the exact SVD.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    departs: ClassVar[bool] = True

    gamma: Positive = 128.0
    normalise: bool = True
    anchored: bool = False
    niter: CountOrZero | None = 4

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        G, r = gradient_of(evidence, "LoRA-One"), site.rank
        U, S, Vh = triplets(-G, r, self.niter, evidence, oversample=3 * r)
        if self.normalise:
            S = S / S[0].clamp_min(torch.finfo(S.dtype).tiny)
        return split_triplets(U, S, Vh, self.gamma)


register("lora_one", "initialization", __doc__, RSLORA_FORM, start=LoRAOne())
