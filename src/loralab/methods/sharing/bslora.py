"""BSLoRA (PMLR 267:78883; not on arXiv): dW = 2 (B A + T(B_1 A_1) + T(B_2 A_2)).

A, B are the layer's own, A_1, B_1 shared within a block, A_2, B_2 by the whole model. T fits a
shared pair to the layer (`_fits`): "slice" cuts out its middle, "gate" is g_ou g_od (B A) g_iu g_id
with vectors g of the layer, "kron" is (K_B ⊗ B)(K_A ⊗ A).

:summary: A local pair beside one shared within the block and one shared by the model
:equation: dW = 2 (B A + T(B_1 A_1) + T(B_2 A_2)), T = slice, gate or Kronecker product
:trap: Alpha has no effect: the authors' code fixes the factor at 2.
:trap: The rank asked for is that of the model's pair; the local one is a quarter of it.
:trap: Gates are vectors, so a gated pair has rank 1 whatever its own rank.
:trap: The authors cut the middle of a shared pair, the survey's code its first rows.
:title: BSLoRA: Enhancing the Parameter Efficiency of LoRA with Intra-Layer and Inter-Layer Sharing
:authors: Yuhua Zhou, Ruifeng Li, Changhai Zhou, Fei Yang, Aimin Pan
:source: ICML 2025, 2025: section 3
:verified: authors' code (yuhua-zhou/BSLoRA, peft/tuners/share_lora/layer.py, and its script and
    README for the ranks) and the survey arXiv 2601.22708; the paper's text was not to be had
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from loralab.bounds import Count, OneOf, Positive
from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.methods.sharing._fits import SIDES, fitted, shapes
from loralab.recipe import Evidence, Form, Site, Tensors

LEVELS = {"_intra": "layer", "_inter": "model"}  # what the shared tensors' names end with


@dataclass(frozen=True)
class BSLoRA(Form):
    """A local pair, one per block and one per model.

    Args:
        transform: T, see above.
        local, intra, inter: ranks of the layer's, the block's and the model's pair as multiples of
            that asked for. The defaults give 2, 4 and 8 at rank 8, as the authors' configuration
            class does; the 2, 4 and 16 of their script are 0.125, 0.25 and 1 times 16.
        size: side of the shared pairs under "gate" and "kron"; None is the authors' 1024 and 256.
    """

    shared: ClassVar[Mapping[str, str]] = {f + end: LEVELS[end] for end in LEVELS for f in "AB"}

    transform: Annotated[str, OneOf(SIDES)] = "kron"
    local: Positive = 0.25
    intra: Positive = 0.5
    inter: Positive = 1.0
    size: Count | None = None

    def scale(self, alpha: float, rank: int) -> float:
        return 2.0

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return the three pairs, their B at 0, and the layer's gates or Kronecker factors."""
        t: Tensors = {}
        for end, share in zip(("", *LEVELS), (self.local, self.intra, self.inter), strict=True):
            how = self.transform if end else "slice"  # the local pair has the layer's own sides
            r = max(1, round(share * site.rank))
            for name, shape in shapes(how, site.d_out, site.d_in, r, self.size).items():
                if name == "B":
                    t[name + end] = evidence.weight.new_zeros(shape)
                else:
                    t[name + end] = uniform(evidence, name + end, *shape, bound=shape[1] ** -0.5)
        return t

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        pairs = [(t["B"], t["A"])]
        for end in LEVELS:
            level = {name.removesuffix(end): x for name, x in t.items() if name.endswith(end)}
            pairs.append(fitted(self.transform, level, site.d_out, site.d_in))
        return torch.cat([B for B, _ in pairs], -1), torch.cat([A for _, A in pairs], -2)


register("bslora", "sharing", __doc__, BSLoRA())
