"""Each arm against the baseline of its group, on the most honest scores that the study has."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from loralab.report.units import Unit
from loralab.seeds import stable_seed
from loralab.study.results import Key, StudyResults, TrialResult
from loralab.study.statistics import (
    Difference,
    Interval,
    holm,
    paired_difference,
    pooled_seed_variance,
    pooled_t_intervals,
    seeds_needed,
    verdict,
)

Basis = Literal["test", "validation", ""]
Scores = dict[int, tuple[float, np.ndarray | None]]  # seed -> (mean, per item)


@dataclass(frozen=True)
class Comparison:
    """The final scores of one arm and its verdict against the baseline.

    Args:
        basis: "test" (winners re-run on fresh seeds, one look), or "validation" (grid seeds, the
            learning rate for each seed chosen on the other seeds), or "" if nothing is there yet.
        final: mean over seeds with Student's interval, the spread between seeds pooled over arms.
        n_lost: final runs that diverged or were stopped.
        difference: None for the baseline or without common seeds.
        p_difference, p_equivalence: Holm-adjusted over the group.
        verdict: "baseline", "better", "worse", "equivalent", "undecided", "" (nothing to compare).
        reason: why a comparison stays undecided whatever its p values: "one seed", "lost runs".
        seeds_needed: total number of seeds that would decide, if undecided and reachable.
    """

    basis: Basis
    final: Interval
    seeds: tuple[int, ...]
    n_lost: int = 0
    difference: Difference | None = None
    p_difference: float = math.nan
    p_equivalence: float = math.nan
    verdict: str = ""
    reason: str = ""
    seeds_needed: int | None = None


def compare_group(
    results: StudyResults, keys: list[Key], baseline: str, margin: float, unit: Unit
) -> dict[Key, Comparison]:
    """Return one comparison per arm; p values are Holm-adjusted over the arms of the group."""
    basis = _basis(results, keys)
    scores = {key: _final_scores(results, key, basis) for key in keys}
    base = next((key for key in keys if key[0] == baseline), None)
    finals = _final_intervals(scores, unit)
    rows = {key: _alone(results, key, basis, scores[key], finals[key]) for key in keys}
    if base is None:
        return rows
    rows[base] = dataclasses.replace(rows[base], verdict="baseline" if scores[base] else "")
    spread = _seed_spread(scores, base)
    differences = {
        key: d
        for key in keys
        if key != base
        and (d := _difference(key, scores[key], scores[base], margin, unit, spread.get(key)))
    }
    p_difference = holm(np.array([d.p_difference for d in differences.values()]))
    p_equivalence = holm(np.array([d.p_equivalence for d in differences.values()]))
    for i, (key, d) in enumerate(differences.items()):
        rows[key] = _decide(
            dataclasses.replace(
                rows[key],
                difference=d,
                p_difference=float(p_difference[i]),
                p_equivalence=float(p_equivalence[i]),
            ),
            rows[base].n_lost,
            margin,
            len(differences),
        )
    return rows


def _basis(results: StudyResults, keys: list[Key]) -> Basis:
    """Return "test" as soon as one winner was confirmed, else "validation" of the grid, else ""."""
    if any(r.stage == "confirm" and r.test is not None and r.key in keys for r in results.trials):
        return "test"
    finished = any(r.validation is not None and r.key in keys for r in results.trials)
    return "validation" if finished else ""


def _final_scores(results: StudyResults, key: Key, basis: Basis) -> Scores:
    if basis == "test":
        return {
            r.trial.seed: (r.test, r.test_items)
            for r in _confirmed(results, key)
            if r.test is not None
        }
    return _leave_one_seed_out(results, key) if basis == "validation" else {}


def _confirmed(results: StudyResults, key: Key) -> list[TrialResult]:
    """Return the confirm trials at the chosen learning rate."""
    choice = next((c for c in results.choices if c.key == key), None)
    trials = [r for r in results.trials if r.key == key and r.stage == "confirm"]
    if choice is None or choice.best_lr is None:
        return trials
    return [r for r in trials if math.isclose(r.trial.lr, choice.best_lr, rel_tol=1e-6)]


def _leave_one_seed_out(results: StudyResults, key: Key) -> Scores:
    """Return each grid seed's score at the learning rate that the other seeds prefer.

    Scoring a seed at the maximum that it helped to choose flatters every method; with one seed
    alone there is no way round it.
    """
    runs = {
        (r.trial.seed, r.trial.lr): r
        for r in results.trials
        if r.key == key and r.stage == "grid" and r.validation is not None
    }
    seeds = sorted({seed for seed, _ in runs})
    sign = 1.0 if results.higher_is_better else -1.0
    out: Scores = {}
    for seed in seeds:
        judges = [s for s in seeds if s != seed] or [seed]
        lrs = [lr for s, lr in runs if s == seed and all((j, lr) in runs for j in judges)]
        if lrs:
            best = max(lrs, key=lambda lr: sign * np.mean([runs[j, lr].validation for j in judges]))
            out[seed] = (
                float(runs[seed, best].validation or 0.0),
                runs[seed, best].validation_items,
            )
    return out


def _final_intervals(scores: dict[Key, Scores], unit: Unit) -> dict[Key, Interval]:
    """Return mean and interval of every arm's scores; a share of one stays between 0 and 1."""
    values = [np.array([mean for mean, _ in own.values()]) for own in scores.values()]
    found = pooled_t_intervals(values)
    if unit.percent:
        found = [
            dataclasses.replace(
                i, low=float(np.maximum(i.low, 0)), high=float(np.minimum(i.high, 1))
            )
            for i in found
        ]
    return dict(zip(scores, found, strict=True))


def _alone(
    results: StudyResults, key: Key, basis: Basis, scores: Scores, final: Interval
) -> Comparison:
    lost = 0
    if basis == "test":
        lost = sum(r.test is None for r in _confirmed(results, key))
    return Comparison(basis, final, tuple(sorted(scores)), lost)


def _seed_spread(scores: dict[Key, Scores], base: Key) -> dict[Key, tuple[float, float]]:
    """Return (variance, degrees of freedom) between seeds for arms with all of the baseline's."""
    seeds = sorted(scores[base])
    full = [key for key in scores if set(seeds) <= set(scores[key])]
    if len(seeds) < 2:
        return {}
    means = np.array([[scores[key][seed][0] for seed in seeds] for key in full])
    variances, free = pooled_seed_variance(means, full.index(base))
    return {key: (float(variances[i]), float(free[i])) for i, key in enumerate(full)}


def _difference(
    key: Key,
    scores: Scores,
    base: Scores,
    margin: float,
    unit: Unit,
    seed_variance: tuple[float, float] | None,
) -> Difference | None:
    seeds = sorted(set(scores) & set(base))
    if not seeds:
        return None
    items = [(scores[s][1], base[s][1]) for s in seeds]
    parts = [part for pair in items for part in pair if part is not None]
    if len(parts) == 2 * len(items) and len({part.size for part in parts}) == 1:
        d = np.array(
            [
                m.astype(float) - b.astype(float)
                for m, b in zip(parts[::2], parts[1::2], strict=True)
            ]
        )
    else:
        d = np.array([[scores[s][0] - base[s][0]] for s in seeds])
    rng = np.random.default_rng(stable_seed("paired bootstrap", *key))
    return paired_difference(unit.sign * d, margin, rng, seed_variance)


def _decide(row: Comparison, baseline_lost: int, margin: float, n_compared: int) -> Comparison:
    assert row.difference is not None
    d = row.difference
    if d.n_seeds < 2:
        return dataclasses.replace(row, verdict="undecided", reason="one seed")
    said = verdict(d.estimate, row.p_difference, row.p_equivalence)
    # Runs that were lost are missing from the mean, so a good mean proves nothing.
    if (row.n_lost and said != "worse") or (baseline_lost and said != "better"):
        return dataclasses.replace(row, verdict="undecided", reason="lost runs")
    # Holm asks for alpha / n at its strictest step; plan for that.
    needed = seeds_needed(d, margin, 0.05 / n_compared) if said == "undecided" else None
    return dataclasses.replace(row, verdict=said, seeds_needed=needed)
