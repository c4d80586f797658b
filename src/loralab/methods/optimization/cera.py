"""CeRA, arXiv 2602.22911: y = W x + s B Dropout(SiLU(A x)), a gate and dropout in low dimension.

SiLU(z) = z sigmoid(z) gates each of the r features by itself and stays at inference; dropout acts
on the r features in training only. Our reading of the abstract: the text was not to be had, nor
its dropout rate (0.1 is our choice), factor (α / r as in LoRA) or start (LoRA's).

:summary: A SiLU gate and dropout between A and B
:equation: y = W x + s B drop(SiLU(A x))
:trap: It is not linear in x, so there is no dW and it cannot be merged.
:trap: SiLU(z) is about z / 2 near 0: half of LoRA's update while A x is small.
:trap: Dropout acts on the r features, not on the input as LoRA's does.
:title: CeRA: Overcoming the Linear Ceiling of Low-Rank Adaptation via Capacity Expansion
:authors: Hung-Hsuan Chen
:source: arXiv 2602.22911, 2026: our reading of the abstract
:verified: our reading of the abstract; the text was not to be had
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import silu

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import plain_pair
from loralab.recipe import LAYERS, Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class CeRA(Form):
    """LoRA with a SiLU between A and B.

    Args:
        p: the share of the r features that is dropped in training.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    layers: ClassVar[frozenset[str]] = LAYERS - {"Embedding"}

    p: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise UserError(f"p of CeRA must lie in [0, 1), not {self.p}")

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        return plain_pair(site, evidence)

    def draw(self, site: Site, n: int, generator: torch.Generator) -> Tensors:
        """Return the dropout mask [n, r], 0 or 1 / (1 - p)."""
        chance = torch.rand(n, site.rank, generator=generator, device=generator.device)
        return {"mask": (chance >= self.p) / (1 - self.p)}

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        h = silu(x @ t["A"].mT)
        if "mask" in t:
            h = h * t["mask"]
        return h @ t["B"].mT


register("cera", "optimization", __doc__, CeRA())
