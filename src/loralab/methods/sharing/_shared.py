"""What methods with tensors of several layers have in common."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.bounds import Positive
from loralab.recipe import OwnStart, Site, Tensors
from loralab.training.adamw import AdamW


def cut(t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
    """Return B [*, out, r] and A [*, r, in] of this site from a pair made for the largest one."""
    return t["B"][..., : site.d_out, : site.rank], t["A"][..., : site.rank, : site.d_in]


@dataclass(frozen=True)
class Anchorable(OwnStart):
    """The Form's own start.

    Args:
        anchored: subtract the update's first value, so that step 0 is the base.
    """

    anchored: bool = False


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
