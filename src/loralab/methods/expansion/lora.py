"""LoRA: h = W0 x + (α / r) B A x, with A random and B = 0.

The paper draws A from a Gaussian without saying how wide; the authors' code, PEFT and later papers
draw Kaiming-uniform with a = √5, which is U(±1/√n) for n inputs, and so is it here.

:summary: A trained pair of thin matrices beside each frozen weight
:equation: dW = (alpha / r) B A, A ~ U(±1/sqrt(n)), B = 0
:trap: With B = 0 the gradient of A is zero at step 0, so A moves one step later than B.
:trap: The best learning rate depends on s = alpha / r; compare methods only at tuned rates.
:title: LoRA: Low-Rank Adaptation of Large Language Models
:authors: Edward J. Hu, Yelong Shen, Phillip Wallis, Zeyuan Allen-Zhu, Yuanzhi Li, Shean Wang, Lu
    Wang, Weizhu Chen
:source: arXiv 2106.09685, 2021: eq. 3, section 4.1
:verified: paper (section 4.1); equality with installed PEFT
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loralab.bounds import NonNegative, Positive
from loralab.methods import register
from loralab.recipe import Evidence, Form, Site, Tensors

Scaling = Literal["alpha/r", "alpha/sqrt(r)"]


def uniform(evidence: Evidence, purpose: str, *shape: int, bound: float) -> Tensor:
    """Return U(±bound) in W's dtype; drawn in fp64, so that the dtype does not change the draw."""
    draw = torch.rand(*shape, generator=evidence.generator(purpose), dtype=torch.float64)
    return ((2 * draw - 1) * bound).to(evidence.weight)


def normal(evidence: Evidence, purpose: str, *shape: int, std: float) -> Tensor:
    """Return N(0, std²) in W's dtype, drawn in fp64."""
    draw = torch.randn(*shape, generator=evidence.generator(purpose), dtype=torch.float64)
    return (draw * std).to(evidence.weight)


def plain_pair(site: Site, evidence: Evidence) -> Tensors:
    """Return LoRA's start: A ~ U(±1/√n) [r, n] and B = 0 [m, r]."""
    A = uniform(evidence, "A", site.rank, site.d_in, bound=site.d_in**-0.5)
    return {"A": A, "B": evidence.weight.new_zeros(site.d_out, site.rank)}


@dataclass(frozen=True)
class Pair(Form):
    """What Forms made of one pair A, B have in common: dW = s B A, and the choice of s."""

    pair: ClassVar[bool] = True
    owns: ClassVar[frozenset[str]] = frozenset({"A", "B"})

    scaling: Scaling = "alpha/r"

    def scale(self, alpha: float, rank: int) -> float:
        return alpha / (rank if self.scaling == "alpha/r" else math.sqrt(rank))

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        return plain_pair(site, evidence)

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return t["B"], t["A"]


@dataclass(frozen=True)
class LoRA(Pair):
    """One pair A, B. When the user gives no alpha it is alpha_base · r^alpha_power."""

    alpha_base: Positive = 1.0
    alpha_power: NonNegative = 1.0

    def default_alpha(self, rank: int) -> float:
        return self.alpha_base * rank**self.alpha_power


register("lora", "expansion", __doc__, LoRA())
