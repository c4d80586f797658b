"""BiLoRA, arXiv 2403.13037, section 3: dW = s P Λ Q. Lower level: P and Q on one part of the data,
with γ (‖PᵀP - I‖² + ‖QQᵀ - I‖²); upper level: Λ on the other part.

Λ is a softmax of free numbers (which the paper recommends), the numbers themselves ("real") or
their sigmoids, pushed to 0 or 1 by their entropy ("binary"). The paper differentiates through the
lower level (Betty); this is the first-order version.

:summary: Singular vectors learn from training data, singular values from held-out data
:equation: dW = s P diag(softmax(l)) Q; P, Q on one part of the data, l on the other
:trap: Softmax values are never 0, so the update starts at 0 by P = 0.
:trap: The penalty pulls P and Q to orthonormal whatever the loss says.
:trap: Nothing is pruned: the values decide how much each direction counts.
:trap: The paper splits the training data 8 to 2 (on E2E: training and validation data).
:title: BiLoRA: A Bi-level Optimization Framework for Overfitting-Resilient Low-Rank Adaptation of
    Large Pre-trained Models
:authors: Rushi Qiang, Ruiyi Zhang, Pengtao Xie
:source: arXiv 2403.13037, 2024: section 3
:verified: the abstract and public reviews of the paper (ICLR 2024), with its split of 8 to 2; the
    text and code could not be had, so the start P = 0 is ours
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from loralab.bounds import NonNegative, OneOf
from loralab.methods import register
from loralab.methods.budgeting._svd import AXES, AdaSVD
from loralab.recipe import Evidence, Form, Recipe, Site, Tensors
from loralab.training.adamw import AdamW

VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "real": lambda x: x,
    "binary": lambda x: x.sigmoid(),
}


@dataclass(frozen=True)
class PseudoSVD(Form):
    """Pseudo singular vectors P, Q and values Λ.

    Args:
        values: how Λ comes from its free numbers.
        gamma: γ, in training only; AdaLoRA's by default.
        gamma_binary: weight of the entropy of "binary" values.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"P", "Lambda", "Q"})
    rank_axis: ClassVar[Mapping[str, int]] = AXES

    values: Annotated[str, OneOf(VALUES)] = "softmax"
    gamma: NonNegative = 0.1
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
        total = AdaSVD(gamma=self.gamma).penalty(t, site)
        if self.values == "binary":
            p = t["Lambda"].sigmoid()
            entropy = torch.special.entr(p) + torch.special.entr(1 - p)
            total = total + self.gamma_binary * entropy.sum(-1)
        return total


@dataclass(frozen=True)
class UpperLambda(AdamW):
    """AdamW; Lambda's gradient is of held-out data."""

    singles_out: ClassVar[frozenset[str]] = frozenset({"Lambda"})
    held_out: ClassVar[frozenset[str]] = frozenset({"Lambda"})


register("bilora", "budgeting", __doc__, PseudoSVD(), rule=UpperLambda())
