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


def new_pairs(site: SiteState, fresh: Tensor, *purpose: object) -> None:
    """Draw the rows of A in the mask `fresh` [K, b] as LoRA does; their columns of B stay 0."""
    A = site.t["A"]
    for slot, new, source in new_ranks(site, fresh, *purpose):
        draw = torch.rand(len(new), A.shape[-1], generator=source, dtype=torch.float64)
        A[slot, new] = ((2 * draw - 1) * A.shape[-1] ** -0.5).to(A)
