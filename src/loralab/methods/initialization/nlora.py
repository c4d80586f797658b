"""NLoRA, arXiv 2502.14482: dW = s B N A, a trained core N [r, r] between B and A.

It starts as the Nyström approximation of W: B = W[:, :r], A = W[:r, :], N = W[:r, :r]⁺. The form is
MoSLoRA's (the paper's SLoRA), whose M is N.

Our defaults, Nyström's inverse and an anchored start, are neither public code's: both put the block
itself into N (`core="block"`) and add the start to W (`anchored=False`).

:summary: A trained core between A and B, started from slices of the weight
:equation: dW = s (B N A - B0 N0 A0), B0 = W[:, :r], N0 = W[:r, :r]^+ / s, A0 = W[:r]
:trap: An ill-conditioned block makes N0 huge, and with it the gradients of A and B.
:trap: Both public codes put the block into N, not its inverse, and do not correct W.
:title: NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models
:authors: Chenlu Guo, Yi Chang, Yuan Wu
:source: arXiv 2502.14482, 2025: Nyström initialization
:verified: authors' code (TracyGuo2001/NLoRA, peft/tuners/lora/layer.py) and LoRAFactory's nlora.py
    for core='block', anchored=False; abstract and README for the Nyström method; the inverse is
    Nyström's own formula and the anchor our choice, the paper's equations could not be read
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from loralab.bounds import PartShare
from loralab.methods import register
from loralab.methods.optimization.moslora import MoSLoRA
from loralab.recipe import Evidence, Site, Start, Tensors


@dataclass(frozen=True)
class Nystrom(Start):
    """The first rows and columns of W and the inverse of the block they share.

    Args:
        core: N, the block's "inverse" or the "block" itself.
        anchored: subtract the start, so that step 0 is the base.
        rtol: singular values of the block below this share of the largest count as 0 (our choice,
            which bounds N).
    """

    pair_only: ClassVar[bool] = False
    singles_out: ClassVar[frozenset[str]] = frozenset({"A", "B", "M"})
    departs: ClassVar[bool] = True
    seeded = False

    core: Literal["inverse", "block"] = "inverse"
    anchored: bool = True
    rtol: PartShare = 1e-3

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        W, r = evidence.weight, site.rank
        N = W[:r, :r]
        if self.core == "inverse":  # with s taken out: s B N A is the approximation itself
            N = torch.linalg.pinv(N.double(), rtol=self.rtol).to(W) / evidence.scale
        return {"A": W[:r].clone(), "B": W[:, :r].clone(), "M": N.clone()}


register("nlora", "initialization", __doc__, MoSLoRA(), start=Nystrom())
