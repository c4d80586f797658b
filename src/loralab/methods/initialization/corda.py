"""CorDA, arXiv 2406.05223, section 3: W C = U S Vᵀ with C the second moment of the layer's inputs,
so W = U S Vᵀ C⁻¹ and its triplets are ordered by what the data sees of W.

B = U √S, A = √S Vᵀ C⁻¹ with the r largest triplets ("ipm": instruction-previewed adaptation, C of
the task's data) or the r smallest ("kpm": knowledge-preserved adaptation, C of data whose knowledge
is to stay). W keeps the rest: the start is anchored, the update is s (B A - B0 A0).

:summary: Starts from triplets of W weighed by the inputs' second moment
:equation: W C = U S V^T, B0 = U sqrt(S/s), A0 = sqrt(S/s) V^T C^-1, top or bottom r
:trap: kpm wants other data than the task's: those whose knowledge is to be kept.
:trap: The size of C moves weight between A and B but not their product; C is a mean over tokens
    here, a sum over each sample's tokens in PEFT.
:trap: C⁻¹ needs the damping when there are fewer tokens than inputs.
:title: CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware
    Parameter-Efficient Fine-tuning
:authors: Yibo Yang, Xiaojie Li, Zhongzhu Zhou, Shuaiwen Leon Song, Jianlong Wu, Liqiang Nie,
    Bernard Ghanem
:source: arXiv 2406.05223, 2024: eqs. 2 to 5, sections 3.2 to 3.4
:verified: paper (section 3); equality with installed PEFT (after the authors' code)
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from loralab.bounds import Positive
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.budgeting.eva import covariance_of
from loralab.methods.expansion.lora import LoRA
from loralab.methods.initialization._svd import split_triplets
from loralab.recipe import Evidence, Site, Start, Tensors


@dataclass(frozen=True)
class CorDA(Start):
    """Triplets of W seen through the inputs.

    Args:
        mode: "ipm" or "kpm".
        damping: added to C's diagonal in units of its mean, and doubled until C can be inverted
            (section 3.2).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"covariance"})
    anchored = True

    mode: Literal["ipm", "kpm"] = "ipm"
    damping: Positive = 0.01

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        C, r = covariance_of(evidence, "CorDA"), site.rank
        one = torch.eye(len(C)).to(C)
        damping = self.damping * C.diagonal().mean().clamp_min(1e-30)
        for _ in range(64):
            damped = C + damping * one
            inverse = torch.linalg.inv(damped)
            if torch.dist(damped @ inverse, one) < 0.05:
                break
            damping = damping * 2
        else:
            raise UserError(f"CorDA cannot invert the inputs' second moment at {site.name}")
        U, S, Vh = torch.linalg.svd(evidence.weight.double() @ damped, full_matrices=False)
        part = slice(0, r) if self.mode == "ipm" else slice(len(S) - r, None)
        t = split_triplets(U[:, part], S[part], Vh[part] @ inverse, evidence.scale)
        return {name: tensor.to(evidence.weight) for name, tensor in t.items()}


register("corda", "initialization", __doc__, LoRA(), start=CorDA())
