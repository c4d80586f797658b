"""Full fine-tuning of the targeted layers: W' = W + D with D [out, in] dense, trained, 0 at first.

The baseline that low-rank methods are measured against. Weights outside the targets stay frozen.

:summary: Ordinary fine-tuning of every weight of the targeted layers
:equation: W' = W + D, D = 0
:trap: Memory per trial is that of the model: weights, gradients and two moments.
:trap: Weight decay acts on D, so it pulls towards the base and not towards zero.
:title: Decoupled Weight Decay Regularization
:authors: Ilya Loshchilov, Frank Hutter
:source: arXiv 1711.05101, 2017: algorithm 2 (the optimizer; the form is ordinary fine-tuning)
:verified: definition
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.methods import register
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class Dense(Form):
    """A dense update; rank and alpha play no part."""

    owns: ClassVar[frozenset[str]] = frozenset({"D"})
    dense: ClassVar[bool] = True
    any_rank: ClassVar[bool] = True

    def scale(self, alpha: float, rank: int) -> float:
        return 1.0

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        return {"D": evidence.weight.new_zeros(site.d_out, site.d_in)}

    def delta(self, t: Tensors, site: Site) -> Tensor:
        return t["D"]


register("full", "baseline", __doc__, Dense(), aliases=("none", "full_finetuning", "fft"))
