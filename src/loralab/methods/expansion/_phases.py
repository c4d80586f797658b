"""Schedules that cut the run into phases, each with a pair that starts anew."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.bounds import Count
from loralab.recipe import Schedule, SiteState


@dataclass(frozen=True)
class Phases(Schedule):
    """A run in phases. What they trained is folded into a frozen term: its rank adds up.

    Args:
        every: optimizer steps per phase; None cuts the run into equal ones.
    """

    pair_only: ClassVar[bool] = True
    shortest: ClassVar[int] = 2  # after a single step the next phase would know nothing of the last

    every: Count | None = None

    def length(self, n_phases: int, n_steps: int) -> int:
        """Return the steps per phase."""
        return self.every or max(self.shortest, -(-n_steps // n_phases))

    def ended(self, n_phases: int, step: int, n_steps: int) -> int:
        """Return how many phases are over if one ends with 0-based `step` and another follows.

        Otherwise return 0.
        """
        count, rest = divmod(step + 1, self.length(n_phases, n_steps))
        return 0 if rest or step + 1 >= n_steps else count

    def ranks(self, sites: Sequence[SiteState]) -> list[Tensor]:
        return [total_rank(site, site.site.rank) for site in sites]


def forget(site: SiteState) -> None:
    """Empty the optimizer's memory of the site, its step count included."""
    for memory in site.state.values():
        memory.zero_()


def total_rank(site: SiteState, present: Tensor | int) -> Tensor:
    """Return the rank [K] that the folded updates and a `present` one can have together."""
    return (site.n_folded + present).clamp(max=min(site.site.d_in, site.site.d_out)).long()
