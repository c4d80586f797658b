"""What methods with tensors of several layers have in common."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.bounds import Positive
from loralab.recipe import Form, OwnStart, Recipe, Site, Tensors
from loralab.training.adamw import AdamW


def cut(t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
    """Return B [*, out, r] and A [*, r, in] of this site from a pair made for the largest one."""
    return t["B"][..., : site.d_out, : site.rank], t["A"][..., : site.rank, : site.d_in]


class StartsOff(Form):
    """A Form whose own start is not the base."""

    def objection(self, recipe: Recipe) -> tuple[str, str] | None:
        if recipe.start.anchored or isinstance(recipe.start, AnchoredStart):
            return None
        return "start", "its first update is not 0, so it needs a start that takes it off the base"


@dataclass(frozen=True)
class AnchoredStart(OwnStart):
    """The Form's own random start.

    Args:
        anchored: subtract B0 A0, so that step 0 is the base; without that it is off by B0 A0.
    """

    anchored: bool = True


@dataclass(frozen=True)
class BankRates(AdamW):
    """AdamW with a learning rate of its own for a shared bank of vectors.

    Args:
        ratio: the bank's rate as a multiple of the others'; VB-LoRA has 0.001 / 0.01.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"bank"})

    ratio: Positive = 0.1

    def lr_ratio(self, name: str) -> float:
        return self.ratio if name == "bank" else 1.0
