"""Pruning and expansion of ranks as in BeamLoRA (arXiv 2502.13604), whatever they are compared by.

Every Δt steps all ranks of all modules are sorted by importance; those beyond a share p of the
total (top-p) are pruned, and as many of the best of the same module are expanded into their places:
the pruned rank takes the parent's A and B, and their moments, of half a period ago, and both take
the mean of their gates. p rises as a cosine from p0 to 1, where pruning ends.

At most half of a module's ranks are pruned at once (ours). In the authors' code the moments' copies
are written to a temporary and lost; here they arrive.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loralab.bounds import SomeShare
from loralab.recipe import Schedule, SiteState

PAIR = {kind + name for kind in ("", "m.", "v.") for name in ("A", "B")}  # and Adam's moments


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


@dataclass(frozen=True)
class TopP(Schedule):
    """Base of schedules that prune and expand within each module.

    Args:
        interval: Δt as a fraction of the run, at least two steps.
        p: p0, the share of the total importance that stays at first.
        until: fraction of the run at which p has reached 1.
    """

    interval: SomeShare = 0.08
    p: SomeShare = 0.95
    until: SomeShare = 2 / 3

    def importance(self, site: SiteState) -> Tensor:
        """Return [K, r] to compare the ranks of all sites by."""
        raise NotImplementedError

    def threshold(self, step: int, n_steps: int) -> float:
        """Return p after 0-based `step`."""
        done = min(1.0, (step + 1) / (self.until * n_steps))
        return 1 - (1 - self.p) * (1 + math.cos(math.pi * done)) / 2

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Remember the parents at half a period; prune and expand at its end, but not the last."""
        t, every = step + 1, max(2, round(self.interval * n_steps))
        if t % every == every // 2:
            for site in sites:
                remember(site)
        elif t % every == 0 and n_steps - t >= every and "was.A" in sites[0].state:
            for site, weak in zip(sites, self.weak(sites, step, n_steps), strict=True):
                self.expand(site, weak, step)

    def weak(self, sites: Sequence[SiteState], step: int, n_steps: int) -> list[Tensor]:
        """Return masks [K, r] of the ranks to prune: beyond the share p, half of a module's."""
        return beyond([self.importance(site) for site in sites], self.threshold(step, n_steps))

    def expand(self, site: SiteState, weak: Tensor, step: int) -> None:
        """Put the strongest ranks' past in the places of the weak ones, in random order."""
        gate, order = site.t["gate"], ranked(self.importance(site))
        for slot in range(len(weak)):
            places = weak[slot].nonzero().flatten()
            mix = torch.randperm(len(places), generator=site.generator(slot, "beam", step))
            parents = order[slot, mix.to(order.device)]
            recall(site, slot, places, parents)
            # A parent has one child, so the mean of the two gates is each one's new gate.
            mean = (gate[slot, places] + gate[slot, parents]) / 2
            gate[slot, places], gate[slot, parents] = mean, mean
        for name in {"m.gate", "v.gate"} & site.state.keys():
            site.state[name].zero_()
