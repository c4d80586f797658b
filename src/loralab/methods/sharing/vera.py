"""VeRA: h = W0 x + Λ_b B Λ_d A x, with A, B random, frozen and shared.

One pair A, B serves all adapted layers, cut to each layer's size; a layer trains two vectors.

:summary: Two trained vectors per layer around one frozen random pair for the whole model
:equation: dW = diag(b) B diag(d) A, A and B frozen, random and shared; b0 = 0, d0 = 0.1
:trap: A and B are shared by all layers of a trial: they are made once, for the largest layer, and
    sliced.
:trap: Alpha has no effect; ranks of 256 and more are usual and may exceed the layer.
:trap: It wants learning rates some ten times LoRA's.
:title: VeRA: Vector-based Random Matrix Adaptation
:authors: Dawid J. Kopiczko, Tijmen Blankevoort, Yuki M. Asano
:source: arXiv 2310.11454, 2023: eq. 2; section 3.3, the start
:verified: equality with installed PEFT; the survey's formula; a reader's notes by section (Kaiming
    A and B, b = 0, d = 0.1 on GLUE); the paper's text was not to be had
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.bounds import Positive
from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.methods.sharing._shared import cut
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class VeRA(Form):
    """Two trained diagonals around a frozen random pair.

    Args:
        d_initial: value of every entry of d at the start; b starts at 0.
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    shared: ClassVar[Mapping[str, str]] = {"A": "model", "B": "model"}
    owns: ClassVar[frozenset[str]] = frozenset({"d", "b"})
    any_rank: ClassVar[bool] = True  # the paper uses 256 and more: only r + m numbers are trained

    d_initial: Positive = 0.1

    def scale(self, alpha: float, rank: int) -> float:
        """Return 1: the paper has no alpha, and d takes its place."""
        return 1.0

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [r, in], B [out, r] (Kaiming-uniform, gain √2), d [r] and b [out]."""
        r, m, n = site.rank, site.d_out, site.d_in
        return {
            "A": uniform(evidence, "A", r, n, bound=(6 / n) ** 0.5),
            "B": uniform(evidence, "B", m, r, bound=(6 / r) ** 0.5),
            "d": evidence.weight.new_full((r,), self.d_initial),
            "b": evidence.weight.new_zeros(m),
        }

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        B, A = cut(t, site)
        return t["b"].unsqueeze(-1) * B, t["d"].unsqueeze(-1) * A


register("vera", "sharing", __doc__, VeRA())
