"""OLoRA, arXiv 2406.01775, section 3: W = Q R, B = Q_r, A = R_r, W_res = W - s Q_r R_r.

B starts orthonormal. The scale is not divided out, as in the paper and its authors' PEFT code; the
start is anchored, so no residual is stored.

:summary: Starts from the QR decomposition of the weight
:equation: B0 = Q_r, A0 = R_r, dW = s (B A - B0 A0)
:trap: A Conv1D stores W transposed; QR is of W [out, in], not of what is stored.
:title: OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models
:authors: Kerim Büyükakyüz
:source: arXiv 2406.01775, 2024: section 3, algorithm 1
:verified: installed PEFT's code (by the paper's author)
"""

from dataclasses import dataclass

import torch

from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.recipe import Evidence, Site, Start, Tensors


@dataclass(frozen=True)
class OLoRA(Start):
    """The first r columns of Q and rows of R, for W of any shape [out, in]."""

    anchored = True
    seeded = False

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        Q, R = torch.linalg.qr(evidence.weight, mode="reduced")
        return {"A": R[: site.rank].clone(), "B": Q[:, : site.rank].clone()}


register("olora", "initialization", __doc__, LoRA(), start=OLoRA())
