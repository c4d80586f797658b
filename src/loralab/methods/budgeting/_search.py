"""Two levels: weights α learn from held-out data for a part of the run, then A and B start anew."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from loralab.bounds import InnerShare, Positive
from loralab.methods.budgeting._ranks import in_use, regrow
from loralab.recipe import Form, Schedule, SiteState
from loralab.training.adamw import AdamW


class Searching(Form):
    """Base of forms with weights α that hold while the frozen `searching` [1] is 1."""

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "alpha", "searching"})
    frozen: ClassVar[frozenset[str]] = frozenset({"searching"})


@dataclass(frozen=True)
class TwoLevel(AdamW):
    """AdamW; alpha's gradient is of held-out data.

    Args:
        ratio: alpha's learning rate over that of A and B.
        order: "second" takes that gradient through a step on the training data (three more passes
            a step), "first" at the present A and B (one more).
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"alpha"})
    held_out: ClassVar[frozenset[str]] = frozenset({"alpha"})

    ratio: Positive = 10.0
    order: Literal["first", "second"] = "second"

    @property
    def unrolls(self) -> bool:
        return self.order == "second"

    def lr_ratio(self, name: str) -> float:
        return self.ratio if name in self.held_out else 1.0


@dataclass(frozen=True)
class Search(Schedule):
    """Base of schedules that choose ranks or modules by α and start them anew.

    Args:
        search: the share of the run that searches; at least one step.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"alpha", "searching"})
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B", "alpha"})
    changes: ClassVar[frozenset[str]] = frozenset({"searching"})
    resizes: ClassVar[bool] = True

    search: InnerShare = 0.5

    def ends(self, step: int, n_steps: int) -> bool:
        """Return whether the search ends with 0-based `step`."""
        return step + 1 == self._length(n_steps) < n_steps

    def searches(self, step: int, n_steps: int) -> bool:
        return step < self._length(n_steps)

    def _length(self, n_steps: int) -> int:
        return max(1, round(self.search * n_steps))

    def ranks(self, sites: Sequence[SiteState]) -> list[Tensor] | None:
        return in_use(sites, "B")


def anew(site: SiteState, keep: Tensor) -> None:
    """Go on with the ranks in the mask `keep` [K, r], from a fresh start and without a search."""
    regrow(site, keep)
    alive = site.state.pop("alive")
    site.renew(1)
    site.fixed["searching"].zero_()
    site.t["A"].mul_(alive.unsqueeze(-1))  # a slot with fewer ranks keeps the rest at 0
    for memory in site.state.values():
        memory.zero_()
    site.state["alive"] = alive
