"""LoRAN: dW = s Sinter(B A), element by element, with Sinter(z) = z + a sin(f z) z.

A structured perturbation without further parameters. By its abstract the function is to fit the
accumulated weight updates, so here it acts on B A and can be merged; the survey arXiv 2601.22708
and LoRAFactory let it act on the branch's output: `LoRANOutput`. The paper was not to be had, nor
its sequel (Enhancing Low-Rank Adaptation with Structured Nonlinear Transformations, arXiv
2509.21870), nor their a and f; 1 and 1 are LoRAFactory's.

:summary: A sine-perturbed low-rank product: more rank at LoRA's count
:equation: dW = s (Z + a sin(f Z) Z), Z = B A
:trap: Sinter(B A) x is not Sinter(B A x): the survey's reading is the form LoRANOutput.
:trap: Near 0 it is LoRA; the perturbation is of second order in B A.
:title: LoRAN: Improved Low-Rank Adaptation by a Non-Linear Transformation
:authors: Yinqiao Li, Linqi Song, Hanxu Hou
:source: Findings of EMNLP 2024 (sequel: arXiv 2509.21870), 2024: Sinter, as given by LoRAFactory
:verified: our reading of the abstract for where Sinter acts, LoRAFactory (loran.py) for Sinter; the
    text was not to be had
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.bounds import NonNegative
from loralab.methods import register
from loralab.methods.expansion.lora import plain_pair
from loralab.recipe import LAYERS, Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class Sinter(Form):
    """A pair and a non-linear function for what it gives.

    Args:
        amplitude: a; 0 is LoRA.
        frequency: f.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    rank_axis: ClassVar[dict[str, int]] = {"A": -2, "B": -1}

    amplitude: NonNegative = 1.0
    frequency: NonNegative = 1.0

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        return plain_pair(site, evidence)

    def sinter(self, z: Tensor) -> Tensor:
        """Return z + a sin(f z) z."""
        return z * (1 + self.amplitude * (self.frequency * z).sin())


@dataclass(frozen=True)
class LoRAN(Sinter):
    """Sinter of the low-rank product."""

    def delta(self, t: Tensors, site: Site) -> Tensor:
        return self.sinter(t["B"] @ t["A"])


@dataclass(frozen=True)
class LoRANOutput(Sinter):
    """The survey's reading, y = W x + s Sinter(B A x): not linear in x, so not mergeable."""

    layers: ClassVar[frozenset[str]] = LAYERS - {"Embedding"}

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        return self.sinter((x @ t["A"].mT) @ t["B"].mT)


register("loran", "optimization", __doc__, LoRAN())
