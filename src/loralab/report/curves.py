"""Learning-rate curves from the grid trials, and their peaks."""

import math
from dataclasses import dataclass

import numpy as np

from loralab.seeds import stable_seed
from loralab.study.results import Key, StudyResults, TrialResult
from loralab.study.statistics import Peak, fit_peak


@dataclass(frozen=True)
class CurvePoint:
    """One learning rate of one arm: validation scores over seeds (nan: not finished)."""

    lr: float
    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    n_diverged: int
    n_stopped: int

    @property
    def finite(self) -> list[float]:
        """Return the scores of the seeds that finished."""
        return [s for s in self.scores if math.isfinite(s)]

    @property
    def mean(self) -> float:
        """Return the mean over finished seeds, nan if there is none."""
        return float(np.mean(self.finite)) if self.finite else math.nan

    @property
    def low(self) -> float:
        """Return the lowest seed."""
        return min(self.finite, default=math.nan)

    @property
    def high(self) -> float:
        """Return the highest seed."""
        return max(self.finite, default=math.nan)


def curve_points(results: StudyResults, key: Key) -> tuple[CurvePoint, ...]:
    """Return the arm's points on the grid, ascending in learning rate."""
    trials = [r for r in results.trials if r.key == key and r.stage == "grid"]
    points = []
    for lr in sorted({r.trial.lr for r in trials}):
        here = sorted((r for r in trials if r.trial.lr == lr), key=lambda r: r.trial.seed)
        points.append(
            CurvePoint(
                lr,
                tuple(r.trial.seed for r in here),
                tuple(score(r) for r in here),
                sum(r.status == "diverged" for r in here),
                sum(r.status == "stopped" for r in here),
            )
        )
    return tuple(points)


def score(result: TrialResult) -> float:
    """Return the validation score of a finished trial, nan for every other."""
    if result.status != "done" or result.validation is None:
        return math.nan
    return float(result.validation)


def fit_curve(
    results: StudyResults, key: Key, curve: tuple[CurvePoint, ...], margin: float
) -> Peak | None:
    """Return the peak of the arm's curve, or None if nothing finished."""
    seeds = sorted({seed for point in curve for seed in point.seeds})
    if not seeds:
        return None
    table = np.full((len(curve), len(seeds)), np.nan)
    for i, point in enumerate(curve):
        for seed, value in zip(point.seeds, point.scores, strict=True):
            table[i, seeds.index(seed)] = value
    items = _items(results, key, curve, seeds)
    rng = np.random.default_rng(stable_seed("peak", *key))
    lrs = np.array([point.lr for point in curve])
    return fit_peak(lrs, table, margin, rng, results.higher_is_better, items)


def _items(
    results: StudyResults, key: Key, curve: tuple[CurvePoint, ...], seeds: list[int]
) -> np.ndarray | None:
    """Return validation scores per item [L, S, I], nan where a trial has none; None without any."""
    found = {
        (r.trial.lr, r.trial.seed): np.asarray(r.validation_items, dtype=float)
        for r in results.trials
        if r.key == key and r.stage == "grid" and r.validation_items is not None
    }
    if len({items.size for items in found.values()}) != 1:
        return None
    n_items = next(iter(found.values())).size
    out = np.full((len(curve), len(seeds), n_items), np.nan)
    for (lr, seed), items in found.items():
        i = next(i for i, point in enumerate(curve) if point.lr == lr)
        out[i, seeds.index(seed)] = items
    return out
