"""CeRA: y = W x + s B Dropout(SiLU(A x)), a gate and dropout in low dimension.

SiLU(z) = z sigmoid(z) gates each of the r features by itself and stays at inference; dropout acts
on the r features in training only. A begins as Kaiming-normal, N(0, 2/n), which is 2.4 times wider
than LoRA's and decides how far from z / 2 the gate works; B = 0.

:summary: A SiLU gate and dropout between A and B
:equation: y = W x + s B drop(SiLU(A x))
:trap: It is not linear in x, so there is no dW and it cannot be merged.
:trap: SiLU(z) is about z / 2 near 0: half of LoRA's update while A x is small.
:trap: Dropout acts on the r features, not on the input as LoRA's does.
:trap: The author's branch has no factor s; it is 1 with the default alpha = r.
:title: CeRA: Overcoming the Linear Ceiling of Low-Rank Adaptation via Capacity Expansion
:authors: Hung-Hsuan Chen
:source: arXiv 2602.22911, 2026: eq. 2, as the author's code quotes it
:verified: author's code (hhchen1105/cera-refactored), which quotes eq. 2; of the paper's own text
    the abstract only
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import silu

from loralab.bounds import PartShare
from loralab.methods import register
from loralab.methods.expansion.lora import normal
from loralab.recipe import LAYERS, Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class CeRA(Form):
    """LoRA with a SiLU between A and B.

    Args:
        p: the share of the r features that is dropped in training.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    layers: ClassVar[frozenset[str]] = LAYERS - {"Embedding"}

    p: PartShare = 0.1

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        A = normal(evidence, "A", site.rank, site.d_in, std=(2 / site.d_in) ** 0.5)
        return {"A": A, "B": evidence.weight.new_zeros(site.d_out, site.rank)}

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
