"""SineLoRA: dW = s sin(ω B A) / g, element by element, with fixed ω and g.

The sine raises the rank: for a large ω that of sin(ω B A) exceeds that of B A. It acts on the
matrix, so the update can be merged. g = √n for n inputs, as in the authors' code, which has no
default for ω: 200 is our choice, one of the values in the paper's ablation by its public reviews.

:summary: The sine of a low-rank product: full rank at LoRA's count, still mergeable
:equation: dW = s sin(omega B A) / sqrt(in)
:trap: sin(omega B A) x is not sin(omega B A x), which LoRAFactory computes.
:trap: Near 0 it is omega / sqrt(in) times LoRA's update: the best rate shifts with both.
:title: Efficient Learning with Sine-Activated Low-Rank Matrices
:authors: Yiping Ji, Hemanth Saratchandran, Cameron Gordon, Zeyu Zhang, Simon Lucey
:source: arXiv 2403.19243, 2024: section 3, sin(omega U V^T) / g
:verified: authors' code (samy-ji/Sine-Low-Rank, llm/peft/src/peft/tuners/sinlora.py); the paper's
    text was not to be had
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.bounds import Positive
from loralab.methods import register
from loralab.methods.expansion.lora import plain_pair
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class SineLoRA(Form):
    """The sine of a low-rank product.

    Args:
        omega: ω, the frequency.
        g: what the sine is divided by; None for √n with n inputs.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    rank_axis: ClassVar[dict[str, int]] = {"A": -2, "B": -1}

    omega: Positive = 200.0
    g: Positive | None = None

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        return plain_pair(site, evidence)

    def delta(self, t: Tensors, site: Site) -> Tensor:
        return (t["B"] @ (self.omega * t["A"])).sin() / (self.g or site.d_in**0.5)


register("sinelora", "optimization", __doc__, SineLoRA())
