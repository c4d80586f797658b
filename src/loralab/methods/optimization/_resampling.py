"""Flora's schedule (arXiv 2402.03293, algorithm 2): every κ steps a new A, M ← M A_old A_newᵀ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from loralab.bounds import Count
from loralab.methods.expansion._phases import forget
from loralab.recipe import Schedule, SiteState


@dataclass(frozen=True)
class Resampling(Schedule):
    """Draw the projection anew and carry the momentum over.

    Args:
        every: κ, the steps between two draws. None takes the paper's 1000, or a quarter of the run
            where that is less.
    """

    pair_only: ClassVar[bool] = True

    every: Count | None = None

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        count, rest = divmod(step + 1, self.every or min(1000, max(1, -(-n_steps // 4))))
        if rest or step + 1 >= n_steps:
            return
        for site in sites:
            old = (site.t | site.fixed)["A"].clone()
            site.restart(count)
            if "old.A" in site.state:  # such a Rule carries its momentum over by itself
                continue
            if "v.B" in site.state:  # no second moment can follow: AdamW's kind begins anew
                forget(site)
            elif "m.B" in site.state:
                m, new = site.state["m.B"], (site.t | site.fixed)["A"]
                m.copy_(m @ (old @ new.mT))
