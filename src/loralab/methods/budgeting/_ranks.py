"""Ranks that come and go, per slot: which stay, which are new, and what is only padding.

The slots of a bank may have different numbers of ranks. Each slot's own come first, in their old
order, then its new ones; what is left up to the largest slot's number is padding, all zeros, which
no gradient moves: the gradient of a factor's vector is a multiple of the other's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import Count, Share
from loralab.errors import UserError
from loralab.recipe import Schedule, SiteState


@dataclass(frozen=True)
class Window(Schedule):
    """Base of schedules that act between a first and a last part of the run.

    Args:
        t_initial: fraction of the run before the first change of ranks.
        t_final: fraction of the run, at its end, with the final ranks.
    """

    t_initial: Share = 0.1
    t_final: Share = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_initial + self.t_final >= 1:
            raise UserError(
                f"t_initial and t_final of {type(self).__name__} are fractions of the run that "
                f"leave room between them, not {self.t_initial} and {self.t_final}"
            )

    def left(self, step: int, n_steps: int) -> float:
        """Return which part of the time between the two is left after 0-based `step`."""
        first, last = self.t_initial * n_steps, (1 - self.t_final) * n_steps
        return min(1.0, max(0.0, 1 - (step + 1 - first) / max(last - first, 1)))


def due(step: int, n_steps: int, interval: float) -> bool:
    """Return whether a fraction `interval` of the run, at least one step, ends with this step."""
    return (step + 1) % max(1, round(interval * n_steps)) == 0


def alive(site: SiteState, name: str) -> Tensor:
    """Return state["alive"] [K, b], made at first for the vector or matrix `name` [K, ..., b]."""
    if "alive" not in site.state:
        value = site.t[name]
        site.state["alive"] = value.new_ones(value.shape[0], value.shape[-1])
    return site.state["alive"]


def in_use(sites: Sequence[SiteState], name: str) -> list[Tensor]:
    """Return the number of ranks in use at each site, [K] each."""
    return [alive(site, name).sum(-1).long() for site in sites]


def take(value: Tensor, index: Tensor, axis: int) -> Tensor:
    """Return value [K, ...] at index [K, r'] along `axis` (from the back), 0 where it is -1."""
    moved = value.movedim(axis, 1)
    at = index.view(*index.shape, *(1,) * (moved.dim() - 2))
    found = torch.take_along_dim(moved, at.clamp_min(0), 1) * (at >= 0).to(value.dtype)
    return found.movedim(1, axis)


def regrow(
    site: SiteState,
    keep: Tensor,
    n_new: Tensor | None = None,
    own: Mapping[str, int] | None = None,
) -> Tensor:
    """Keep the ranks in the mask `keep` [K, b], add n_new [K] zero ones; return their mask.

    state["alive"] becomes the mask of the ranks in use.

    Args:
        own: the Schedule's own state that follows its ranks: name to axis, counted from the back.
    """
    keep = keep.bool()
    n_kept = keep.sum(-1, keepdim=True)
    n_all = n_kept if n_new is None else n_kept + n_new[:, None]
    place = torch.arange(max(1, int(n_all.max())), device=keep.device)
    order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)
    order = torch.nn.functional.pad(order, (0, max(0, len(place) - order.shape[-1])))
    index = torch.where(place < n_kept, order[:, : len(place)], -1)
    # The Schedule's own state is out of `state` meanwhile: what `resize` does to it is no matter.
    mine = {name: (site.state.pop(name), axis) for name, axis in (own or {}).items()}
    site.state.pop("alive", None)
    site.resize(index)
    for name, (value, axis) in mine.items():
        site.state[name] = take(value, index, axis)
    alive = place < n_all
    site.state["alive"] = alive.to(site.scale.dtype)
    return alive & (index < 0)


@dataclass(frozen=True)
class Truncate(Schedule):
    """Cut to the first ranks at the end of the run, where training has sorted them (DyLoRA).

    Args:
        keep: ranks that stay, b; None keeps all.
    """

    pair_only: ClassVar[bool] = True
    resizes: ClassVar[bool] = True

    keep: Count | None = None

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """After the last step, keep the first ranks; α/b in place of α/r."""
        if step + 1 < n_steps:
            return
        for site in sites:
            B = site.t["B"]
            r = B.shape[-1]
            b = min(self.keep or r, r)
            B.mul_(r / b)
            regrow(site, (torch.arange(r, device=B.device) < b).expand(len(B), r))
