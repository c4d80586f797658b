"""One method against the baseline: paired over seeds and test items, with a verdict.

Both arms of a pair share seed, data order and test items, so only their differences
d[s, i] = score(method) - score(baseline) matter. They are modelled as crossed random effects,
d[s, i] = delta + a_s + b_i + e_si, and the variance of their mean is (MS_a + MS_b - MS_e) / (S I).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from loralab.study.statistics.intervals import resampled_means

Verdict = Literal["better", "worse", "equivalent", "undecided"]


@dataclass(frozen=True)
class Difference:
    """Method minus baseline, turned so that a positive number favours the method.

    Args:
        estimate, low, high: mean difference and its paired bootstrap interval.
        se, df: standard error and Satterthwaite's degrees of freedom.
        p_difference: two-sided p value of "no difference".
        p_equivalence: p value of "at least one margin apart" (TOST, the larger of the two).
        n_seeds, n_items: how many of each the pairs cover (n_items 1: no scores per item).
        var_seed, var_item, var_residual: variance components of one d[s, i]; nan if unknown.
    """

    estimate: float
    low: float
    high: float
    se: float
    df: float
    p_difference: float
    p_equivalence: float
    n_seeds: int
    n_items: int
    var_seed: float
    var_item: float
    var_residual: float


def paired_difference(
    difference: np.ndarray,
    margin: float,
    rng: np.random.Generator,
    seed_variance: tuple[float, float] | None = None,
    level: float = 0.95,
    n_draws: int = 4000,
) -> Difference:
    """Return the mean of d [S seeds, I items] with interval and p values.

    Bootstrap draws add a Gaussian bootstrap of the seed effects (resampling two or three seeds
    gives a handful of values) to a resampling of the items, are scaled to the unbiased variance,
    and are widened from the normal to Student's t with Satterthwaite's degrees of freedom. Both p
    values use the same standard error and degrees of freedom. With one seed the spread between
    seeds is unknown and the interval speaks of the test items alone.

    Args:
        seed_variance: (variance of d's seed means, degrees of freedom) where other arms help to
            estimate it (`pooled_seed_variance`); None takes it from d alone.

    Sources: Searle, Casella and McCulloch (1992), "Variance Components", chapter 4 (crossed
    effects); Satterthwaite (1946); Schuirmann (1987) (TOST); arXiv 1411.5279 (small samples).
    """
    d = np.atleast_2d(np.asarray(difference, dtype=float))
    n_seeds, n_items = d.shape
    mean = float(d.mean())
    v_seed, v_item, v_rest = _variances_of_mean(d)
    free = float(n_seeds - 1)
    if seed_variance is not None and n_seeds > 1:
        v_seed, free = seed_variance[0] / n_seeds, seed_variance[1]
    variance = max(v_seed + v_item - v_rest, v_seed, v_item)
    se = math.sqrt(variance)
    df = _satterthwaite(variance, (v_seed, v_item, v_rest), free, n_items, d.size)
    if n_seeds * n_items == 1:
        nan = math.nan
        return Difference(mean, nan, nan, nan, nan, nan, nan, 1, 1, nan, nan, nan)
    draws = math.sqrt(v_seed) * rng.standard_normal(n_draws)
    if n_items > 1:
        b = d.mean(axis=0) - mean
        draws += resampled_means(b[None], rng, n_draws)[:, 0] * math.sqrt(n_items / (n_items - 1))
    if v_seed + v_item > 0:
        draws *= math.sqrt(variance / (v_seed + v_item))
    q = 0.5 + level / 2
    widen = stats.t.ppf(q, df) / stats.norm.ppf(q)
    low, high = mean + widen * np.quantile(draws, [1 - q, q])
    total = n_seeds * n_items
    return Difference(
        mean,
        float(low),
        float(high),
        se,
        df,
        2 * _tail(abs(mean), se, df),
        _tail(margin - abs(mean), se, df),
        n_seeds,
        n_items,
        max(0.0, (v_seed - v_rest) * n_seeds) if n_seeds > 1 else math.nan,
        max(0.0, (v_item - v_rest) * n_items) if n_items > 1 else math.nan,
        v_rest * total if n_seeds > 1 and n_items > 1 else math.nan,
    )


def _variances_of_mean(d: np.ndarray) -> tuple[float, float, float]:
    """Return (MS_a, MS_b, MS_e) / (S I), zero where an axis has one entry."""
    n_seeds, n_items = d.shape
    mean = d.mean()
    a, b = d.mean(axis=1) - mean, d.mean(axis=0) - mean
    rest = d - mean - a[:, None] - b[None, :]
    v_seed = float(np.sum(a**2) / (n_seeds * (n_seeds - 1))) if n_seeds > 1 else 0.0
    v_item = float(np.sum(b**2) / (n_items * (n_items - 1))) if n_items > 1 else 0.0
    if n_seeds == 1 or n_items == 1:
        return v_seed, v_item, 0.0
    free = (n_seeds - 1) * (n_items - 1)
    return v_seed, v_item, float(np.sum(rest**2) / (free * d.size))


def _satterthwaite(
    variance: float, parts: tuple[float, float, float], free: float, n_items: int, n: int
) -> float:
    """Return the degrees of freedom of a sum of variances with `free`, I - 1 and the rest."""
    if variance == 0:
        return max(free, n_items - 1.0, 1.0)
    frees = (max(free, 1.0), max(n_items - 1, 1), max(n - n_items - n // n_items + 1, 1))
    return variance**2 / sum(v**2 / f for v, f in zip(parts, frees, strict=True))


def _tail(distance: float, se: float, df: float) -> float:
    """Return P(T > distance / se); 1/2 at distance 0, 0 or 1 without any spread."""
    if se == 0:
        return 0.5 if distance == 0 else float(distance < 0)
    return float(stats.t.sf(distance / se, df))


def holm(p_values: np.ndarray) -> np.ndarray:
    """Return Holm-adjusted p values [n] in the caller's order; nan stays nan and is not counted.

    Source: Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    p = np.asarray(p_values, dtype=float)
    adjusted = np.full(p.shape, np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * (order.size - np.arange(order.size))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def verdict(
    estimate: float, p_difference: float, p_equivalence: float, alpha: float = 0.05
) -> Verdict:
    """Return the verdict from (Holm-adjusted) p values.

    Equivalence comes first: a difference may be real and still smaller than the margin fixed
    beforehand. Neither shown means "undecided", never "equal".
    """
    if p_equivalence < alpha:
        return "equivalent"
    if p_difference < alpha:
        return "better" if estimate > 0 else "worse"
    return "undecided"


def seeds_needed(
    difference: Difference, margin: float, alpha: float = 0.05, most: int = 100
) -> int | None:
    """Return how many seeds would decide, were the estimate and the variances the truth.

    "Decide" means that a 1 - alpha interval leaves zero, or a 1 - 2 alpha interval fits inside the
    margin, in expectation (power one half); degrees of freedom grow with the seeds. None: one seed
    only, so no spread is known, or no number up to `most` suffices, because the test set itself is
    too small.
    """
    if not math.isfinite(difference.var_seed):
        return None
    items = max(difference.n_items, 1)
    var_item = 0.0 if math.isnan(difference.var_item) else difference.var_item
    rest = 0.0 if math.isnan(difference.var_residual) else difference.var_residual
    size = abs(difference.estimate)
    for n in range(difference.n_seeds + 1, most + 1):
        se = math.sqrt((difference.var_seed + rest / items) / n + var_item / items)
        df = difference.df * n / difference.n_seeds
        differs = size > stats.t.ppf(1 - alpha / 2, df) * se
        within = margin - size > stats.t.ppf(1 - alpha, df) * se
        if differs or within:
            return n
    return None
