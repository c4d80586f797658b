"""Which trials are hopeless, judged on training loss alone and at equal fractions of the run."""

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loralab.training.loop import _Run


@dataclass(frozen=True)
class EarlyStop:
    """Two rules, both with a reason that is stored.

    * After `grace` of the steps: a trial whose recent loss is above where it began.
    * At `halving` of the steps: within one method, rank, batch size and seed, a trial whose recent
      loss is worse than the family's best by more than `gap` of what the best gained, unless it is
      one of the best's two neighbours in learning rate (so that the optimum stays interior).

    Args:
        grace, halving: fractions of the planned steps in (0, 1).
        gap: fraction of the best trial's improvement.
    """

    grace: float = 0.3
    halving: float = 0.5
    gap: float = 0.5

    def hopeless(self, run: "_Run") -> dict[int, str]:
        """Return {slot: reason} for the slots that should leave after the step just made."""
        if run.step == int(self.grace * run.n_steps):
            return self._no_progress(run)
        if run.step == int(self.halving * run.n_steps):
            return self._behind(run)
        return {}

    def _no_progress(self, run: "_Run") -> dict[int, str]:
        found = {}
        for slot, i in enumerate(run.present):
            first, recent = _ends(run.outcomes[i].curve)
            if not run.active[slot]:
                found[slot] = run.outcomes[i].reason
            elif recent > first:
                found[slot] = f"loss {recent:.3g} above its start {first:.3g}"
        return found

    def _behind(self, run: "_Run") -> dict[int, str]:
        families: dict[tuple, list[int]] = {}
        for slot, i in enumerate(run.present):
            t = run.trials[i]
            key = (t.method, repr(t.swaps), repr(t.settings), t.rank, t.alpha, t.batch_size, t.seed)
            families.setdefault(key, []).append(slot)
        found = {}
        for family in families.values():
            family.sort(key=lambda slot: run.trials[run.present[slot]].lr)
            ends = [_ends(run.outcomes[run.present[slot]].curve) for slot in family]
            best = min(range(len(family)), key=lambda j: ends[j][1])
            allowed = ends[best][1] + self.gap * max(ends[best][0] - ends[best][1], 0.0)
            for j, slot in enumerate(family):
                if abs(j - best) > 1 and ends[j][1] > allowed:
                    found[slot] = f"loss {ends[j][1]:.3g} against {ends[best][1]:.3g} at halving"
        return found


def _ends(curve: list[tuple[int, float]]) -> tuple[float, float]:
    """Return the first recorded loss and the median of the last three."""
    if not curve:
        return float("inf"), float("inf")
    return curve[0][1], statistics.median(loss for _, loss in curve[-3:])
