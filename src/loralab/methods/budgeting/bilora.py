"""BiLoRA: dW = s P Λ Q; P and Q (lower level) learn from one part of the data, Λ from the other.

Λ is a softmax (the paper's advice), "real", or "binary": sigmoids that entropy pushes to 0 or 1.
P and Q have AdaLoRA's penalty. Λ's gradient is through one step of P and Q (order="first": not).

:summary: Singular vectors learn from training data, singular values from held-out data
:equation: dW = s P diag(softmax(l)) Q; P, Q on one part of the data, l on the other
:trap: A step makes four passes (order="first": two); your own loop calls optimizer.step(closure).
:trap: Softmax values are never 0, so the update starts at 0 by P = 0, and nothing is pruned.
:trap: The penalty pulls P and Q to orthonormal whatever the loss says.
:trap: The paper splits the training data 8 to 2 (on E2E: training and validation data).
:title: BiLoRA: A Bi-level Optimization Framework for Overfitting-Resilient Low-Rank Adaptation of
    Large Pre-trained Models
:authors: Rushi Qiang, Ruiyi Zhang, Pengtao Xie
:source: arXiv 2403.13037, 2024: section 3
:verified: the abstract and public reviews of the paper (ICLR 2024); the text and code could not be
    had, so the start P = 0 is ours
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor
from torch.special import entr

from loralab.bounds import NonNegative, OneOf, Positive
from loralab.methods import register
from loralab.methods.budgeting._search import TwoLevel
from loralab.methods.budgeting._svd import AdaSVD, Triplets
from loralab.recipe import Evidence, Recipe, Site, Tensors

VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "real": lambda x: x,
    "binary": lambda x: x.sigmoid(),
}


@dataclass(frozen=True)
class PseudoSVD(Triplets):
    """Pseudo singular vectors and values; gamma_binary weighs the entropy of "binary" ones."""

    values: Annotated[str, OneOf(VALUES)] = "softmax"
    gamma_binary: NonNegative = 0.1

    def objection(self, recipe: Recipe) -> tuple[str, str] | None:
        if self.values != "softmax" or not recipe.schedule.resizes:
            return None
        why = "its values are a softmax over all ranks of a layer, so each would change with them"
        return "schedule", f"{why} (values='real' or 'binary' can do that)"

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return P [out, r], Lambda [r] = 0 and Q [r, in]: AdaLoRA's, but P = 0 where Λ is not."""
        t = AdaSVD(growth=1.0).init(site, evidence)
        return t if self.values == "real" else t | {"P": torch.zeros_like(t["P"])}

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return t["P"] * VALUES[self.values](t["Lambda"]).unsqueeze(-2), t["Q"]

    def penalty(self, t: Tensors, site: Site) -> Tensor | None:
        total = super().penalty(t, site)
        if self.values == "binary":
            p = t["Lambda"].sigmoid()
            total = total + self.gamma_binary * (entr(p) + entr(1 - p)).sum(-1)
        return total


@dataclass(frozen=True)
class UpperLambda(TwoLevel):
    """AdamW; Lambda's gradient is of held-out data."""

    singles_out: ClassVar[frozenset[str]] = frozenset({"Lambda"})
    held_out: ClassVar[frozenset[str]] = frozenset({"Lambda"})

    ratio: Positive = 1.0


register("bilora", "budgeting", __doc__, PseudoSVD(), rule=UpperLambda())
