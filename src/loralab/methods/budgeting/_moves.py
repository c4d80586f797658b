"""Ranks that move, as the scores of all modules decide.

A slot's scores [b] are finite for its ranks and infinite for padding.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from loralab.methods.budgeting._ranks import regrow
from loralab.recipe import SiteState

Moves = tuple[list[tuple[int, int]], list[int]]  # (site, rank) to prune; sites that get a new rank


def move(
    sites: Sequence[SiteState],
    scores: Sequence[Tensor],
    choose: Callable[[list[Tensor]], Moves],
    own: Mapping[str, int] | None = None,
) -> Iterator[tuple[SiteState, Tensor]]:
    """Prune and grow, slot by slot; yield every site that changes and the mask of its new ranks.

    Args:
        scores: importance [K, b] of every site's ranks; `choose` gets one slot's, inf for padding.
        own: as in `regrow`.
    """
    masks = [
        site.state.get("alive", torch.ones_like(score)).bool()
        for site, score in zip(sites, scores, strict=True)
    ]
    keep = [mask.clone() for mask in masks]
    n_new = [mask.sum(-1) * 0 for mask in masks]
    for slot in range(len(masks[0])):
        found = [
            score[slot].masked_fill(~mask[slot], torch.inf)
            for score, mask in zip(scores, masks, strict=True)
        ]
        pruned, grown = choose(found)
        for i, rank in pruned:
            keep[i][slot, rank] = False
        for i in grown:
            n_new[i][slot] += 1
    for site, mask, kept, n in zip(sites, masks, keep, n_new, strict=True):
        if bool((mask != kept).any() or n.any()):
            yield site, regrow(site, kept, n, own)


def lowest_first(scores: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the (site, rank) of all ranks of one slot, those of lowest score first."""
    every = [
        (value, i, rank)
        for i, own in enumerate(scores)
        for rank, value in enumerate(own.tolist())
        if math.isfinite(value)
    ]
    return [(i, rank) for _, i, rank in sorted(every)]


def room(site: SiteState, scores: Tensor) -> int:
    """Return how many more ranks one slot of a site can have."""
    return min(site.site.d_in, site.site.d_out) - int(scores.isfinite().sum())


def mean(scores: Tensor) -> float:
    """Return the mean score of one slot's ranks, minus infinity if it has none."""
    return float(scores[scores.isfinite()].mean().nan_to_num(-torch.inf))


def shared_evenly(n: int, rooms: dict[int, int]) -> list[int]:
    """Return n of the keys of `rooms`, in turns, each as often as its value at most."""
    found: list[int] = []
    while len(found) < n and (able := [i for i, most in rooms.items() if found.count(i) < most]):
        found += able[: n - len(found)]
    return found


def new_ranks(
    site: SiteState, fresh: Tensor, *purpose: object
) -> Iterator[tuple[int, Tensor, torch.Generator]]:
    """Yield every slot, its ranks in the mask `fresh` [K, b], and a generator to draw them with."""
    for slot, mask in enumerate(fresh):
        yield slot, mask.nonzero().flatten(), site.generator(slot, *purpose)


def ranked(scores: Tensor) -> Tensor:
    """Return the ranks [K, b], the best first; equal ones as they stand."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def beyond(scores: Sequence[Tensor], share: float) -> list[Tensor]:
    """Return masks like `scores` [K, b] of the ranks outside top-p, all sites', the best first.

    At most the last half of a site's, whose first in the same order can take their places.
    """
    every = torch.cat(list(scores), -1)
    order = ranked(every)
    total = every.gather(-1, order).cumsum(-1)
    # Measured by the sum's own end, which a share of 1 must not exceed by rounding.
    outside = total > share * total[..., -1:]
    masks = torch.zeros_like(outside).scatter_(-1, order, outside)
    parts = masks.split([score.shape[-1] for score in scores], -1)
    places = [ranked(score).argsort(-1) for score in scores]
    halves = [place >= (place.shape[-1] + 1) // 2 for place in places]
    return [part & half for part, half in zip(parts, halves, strict=True)]


PAIR = {kind + name for kind in ("", "m.", "v.") for name in ("A", "B")}  # and Adam's moments


def remember(site: SiteState) -> None:
    """Keep the pair and its moments for `recall`."""
    now = site.t | site.state
    site.state |= {"was." + name: now[name].clone() for name in PAIR & now.keys()}


def recall(site: SiteState, slot: int, places: Tensor, ranks: Tensor) -> None:
    """Put what one slot's `ranks` were, with their moments, at `places`."""
    now = site.t | site.state
    for name in PAIR & now.keys():
        axis = 0 if name.endswith("A") else 1
        past = now["was." + name][slot].index_select(axis, ranks)
        now[name][slot].index_copy_(axis, places, past)
