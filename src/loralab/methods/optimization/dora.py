"""DoRA: W' = m (W0 + B A) / ‖W0 + B A‖, m = ‖W0‖ at the start.

The norm is per output (the paper's columns of a transposed W are our rows), and section 4.3 holds
it constant in the backward pass.

:summary: Trains the length of each weight row apart from its direction
:equation: W' = m (W + s B A) / |W + s B A| per output row, m0 = |W|
:trap: The norm is over the inputs of each output row, not over the whole matrix.
:trap: The norm is constant in the backward pass; without that the gradient is another one.
:trap: m is neither A nor B: LoRA+'s ratio does not touch it.
:title: DoRA: Weight-Decomposed Low-Rank Adaptation
:authors: Shih-Yang Liu, Chien-Yi Wang, Hongxu Yin, Pavlo Molchanov, Yu-Chiang Frank Wang,
    Kwang-Ting Cheng, Min-Hung Chen
:source: arXiv 2402.09353, 2024: eqs. 5 and 11
:verified: paper (sections 4.1 to 4.3); equality with installed PEFT (use_dora)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.core.stopgrad import stop_gradient
from loralab.methods import register
from loralab.methods.expansion.lora import Pair
from loralab.recipe import Evidence, Site, Tensors


@dataclass(frozen=True)
class DoRA(Pair):
    """LoRA's pair for the direction and a magnitude m [out] per row.

    Args:
        detach_norm: hold the norm constant in the backward pass, as the paper does.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "m"})

    detach_norm: bool = True

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        # The core's own arithmetic for |W_i|, so that the gain at step 0 is exactly 1.
        m = evidence.weight.square().sum(-1).sqrt()
        return super().init(site, evidence) | {"m": m}

    @property
    def constant_norm(self) -> bool:
        return self.detach_norm

    def gain(self, t: Tensors, row_norm: Tensor) -> Tensor:
        norm = stop_gradient(row_norm) if self.detach_norm else row_norm
        # A row of zeros has m = 0 and norm = 0; its gain is 0, not 0/0.
        return t["m"] / norm.clamp_min(torch.finfo(norm.dtype).tiny)


register("dora", "optimization", __doc__, DoRA())
