"""Schedules that cut the run into phases, each with a pair that starts anew."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
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


def keep_largest(x: Tensor, share: float) -> None:
    """Set all but this share of the entries of each slot of x [K, ...] to 0, by size."""
    size = x.flatten(1).abs()
    order = size.argsort(dim=1, descending=True, stable=True)
    n = round(share * size.shape[1])
    x.mul_(torch.zeros_like(size).scatter_(1, order[:, :n], 1.0).view_as(x))


def choose_blocks(sites: Sequence[SiteState], n: int, count: int) -> None:
    """Note in every site's memory as `chosen` which slots [K] train its block in phase `count`.

    Every slot draws n of the transformer blocks for itself.
    """
    for slot in range(len(sites[0].seeds)):
        generator = sites[0].generator(slot, "layers of booster", count)
        order = torch.randperm(sites[0].site.n_layers, generator=generator)
        chosen = set(order[:n].tolist())
        for site in sites:
            mask = site.state.setdefault("chosen", torch.zeros_like(site.scale))
            mask[slot] = float(site.site.layer in chosen)


def total_rank(site: SiteState, present: Tensor | int) -> Tensor:
    """Return the rank [K] that the folded updates and a `present` one can have together."""
    return (site.n_folded + present).clamp(max=min(site.site.d_in, site.site.d_out)).long()
