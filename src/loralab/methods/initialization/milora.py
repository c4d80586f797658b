"""MiLoRA, arXiv 2406.09044, section 3: PiSSA's split with the r smallest singular triplets of W.

W = W_p + W_m, where W_m = U_m S_m V_mᵀ holds the smallest r; B = U_m S_m^½, A = S_m^½ V_mᵀ.

:summary: Starts from the trailing singular triplets of the weight
:equation: B0 = U_m sqrt(S_m/s), A0 = sqrt(S_m/s) V_m^T, dW = s (B A - B0 A0)
:trap: A fast SVD returns the top of the spectrum; MiLoRA needs the bottom, so it is exact.
:trap: A rank-deficient W gives A0 = B0 = 0 in those directions, which never train.
:title: MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning
:authors: Hanqing Wang, Yixia Li, Shuo Wang, Guanhua Chen, Yun Chen
:source: arXiv 2406.09044, 2024: eqs. 3 to 5, section 3
:verified: paper (version 3), the survey arXiv 2601.22708 and the tuning study arXiv 2602.04998
"""

from dataclasses import dataclass

import torch

from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.methods.initialization._svd import split_triplets
from loralab.recipe import Evidence, Site, Start, Tensors


@dataclass(frozen=True)
class MiLoRA(Start):
    """The r trailing singular triplets of W; exact only, a fast SVD finds the leading ones."""

    anchored = True
    seeded = False

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        U, S, Vh = torch.linalg.svd(evidence.weight, full_matrices=False)
        r = site.rank
        return split_triplets(U[:, -r:], S[-r:], Vh[-r:], evidence.scale)


register("milora", "initialization", __doc__, LoRA(), start=MiLoRA())
