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

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.initialization.pissa import fast_svd
from loralab.methods.optimization.rslora import RSLORA_FORM
from loralab.recipe import Evidence, Site, Start, Tensors


@dataclass(frozen=True)
class LoRAOne(Start):
    """Leading singular triplets of the negative gradient at the base.

    Args:
        gamma: the scaling parameter 1/γ, positive; larger starts smaller.
        normalise: divide the singular values by the first one; False is the paper's earlier rule.
        anchored: subtract s B0 A0, so that step 0 is the base; the paper does not.
        niter: power iterations of the fast SVD with a sketch of 4r, as in the authors' code; None
            for the exact SVD.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    departs: ClassVar[bool] = True

    gamma: float = 128.0
    normalise: bool = True
    anchored: bool = False
    niter: int | None = 4

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise UserError(f"gamma of LoRA-One must be positive, not {self.gamma!r}")

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        if evidence.gradient is None:
            raise UserError("LoRA-One looks at gradients: give `data`, an iterable of batches")
        G, r = -evidence.gradient, site.rank
        if self.niter is None:
            U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        else:
            U, S, Vh = fast_svd(G, r, self.niter, evidence.generator("sketch"), oversample=3 * r)
        if self.normalise:
            S = S / S[0].clamp_min(torch.finfo(S.dtype).tiny)
        root = (S[:r] / self.gamma).sqrt()
        return {"A": root[:, None] * Vh[:r], "B": U[:, :r] * root}


register("lora_one", "initialization", __doc__, RSLORA_FORM, start=LoRAOne())
