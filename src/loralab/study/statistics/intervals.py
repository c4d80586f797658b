"""Means and rank correlations with their intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """An estimate with a two-sided interval; `low` and `high` are nan where n is too small."""

    estimate: float
    low: float
    high: float
    n: int


def t_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Return the mean of `values` [n] with Student's t interval; nan values are left out.

    Source: Student (1908), "The probable error of a mean".
    """
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    n = values.size
    if n == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    mean = float(values.mean())
    if n == 1:
        return Interval(mean, np.nan, np.nan, 1)
    half = float(stats.t.ppf(0.5 + level / 2, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


def pooled_t_intervals(groups: Sequence[np.ndarray], level: float = 0.95) -> list[Interval]:
    """Return each group's mean with an interval from the variance pooled over all groups.

    Two or three seeds of one method say nothing of their own spread (Student's t with one degree
    of freedom is 13 standard errors wide), so the groups share it, as in one-way analysis of
    variance (Fisher, 1925). Groups of one value get an interval too. With fewer than three groups
    of two values or more, each stands alone.
    """
    clean = [np.asarray(g, dtype=float) for g in groups]
    clean = [g[np.isfinite(g)] for g in clean]
    several = [g for g in clean if g.size > 1]
    if len(several) < 3:
        return [t_interval(g, level) for g in clean]
    free = sum(g.size - 1 for g in several)
    variance = sum(float(np.var(g, ddof=1)) * (g.size - 1) for g in several) / free
    width = float(stats.t.ppf(0.5 + level / 2, free)) * np.sqrt(variance)
    found = []
    for g in clean:
        mean = float(g.mean()) if g.size else np.nan
        half = width / np.sqrt(g.size) if g.size else np.nan
        found.append(Interval(mean, mean - half, mean + half, g.size))
    return found


def bootstrap_interval(
    values: np.ndarray, rng: np.random.Generator, level: float = 0.95, n_draws: int = 5000
) -> Interval:
    """Return the mean of `values` [n] with a percentile bootstrap interval.

    Draws are spread by sqrt(n / (n - 1)), because resampling n values gives (n - 1) / n of the
    variance. Source: Efron and Tibshirani (1993), chapter 13; arXiv 1411.5279, section 4.
    """
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    n = values.size
    if n < 2:
        return t_interval(values, level)
    mean = float(values.mean())
    draws = values[rng.integers(0, n, (n_draws, n))].mean(axis=1)
    draws = mean + (draws - mean) * np.sqrt(n / (n - 1))
    low, high = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(mean, float(low), float(high), n)


def resampled_means(effects: np.ndarray, rng: np.random.Generator, n_draws: int) -> np.ndarray:
    """Return bootstrap means over the last axis: [n_draws, L] of `effects` [L, I].

    All L rows are resampled by the same items, so differences between rows stay paired.
    """
    n = effects.shape[-1]
    out = np.empty((n_draws, effects.shape[0]))
    chunk = max(1, (1 << 21) // n)
    for first in range(0, n_draws, chunk):
        size = min(chunk, n_draws - first)
        cells = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(cells.ravel(), minlength=size * n).reshape(size, n)
        out[first : first + size] = counts @ effects.T / n
    return out


def spearman(x: np.ndarray, y: np.ndarray, level: float = 0.95) -> Interval:
    """Return Spearman's rank correlation of x [n] and y [n] with its Fisher-z interval.

    The standard error of z is sqrt((1 + rho^2 / 2) / (n - 3)). Pairs with a nan are left out; the
    interval needs n of 4 or more. Source: Bonett and Wright (2000), Psychometrika 65, 23-28.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    n = x.size
    if n < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Interval(np.nan, np.nan, np.nan, n)
    rho = float(stats.spearmanr(x, y).statistic)
    if n < 4:
        return Interval(rho, np.nan, np.nan, n)
    # A perfect order has no Fisher interval: take it halfway to the next attainable rho.
    most = 1 - 6 / (n * (n**2 - 1))
    z = np.arctanh(np.clip(rho, -most, most))
    half = stats.norm.ppf(0.5 + level / 2) * np.sqrt((1 + rho**2 / 2) / (n - 3))
    return Interval(rho, float(min(np.tanh(z - half), rho)), float(max(np.tanh(z + half), rho)), n)
