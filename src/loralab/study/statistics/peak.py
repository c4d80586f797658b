"""The best learning rate with an error bar: a parabola in log LR through the points at the top."""

from dataclasses import dataclass

import numpy as np

from loralab.study.statistics.intervals import resampled_means


@dataclass(frozen=True)
class Peak:
    """The top of one learning-rate curve.

    Args:
        lr, lr_low, lr_high: vertex of the parabola and its bootstrap interval.
        score, score_low, score_high: its height, in the metric's own unit.
        plateau_low, plateau_high: learning rates between which the curve stays within `drop` of the
            best grid point, interpolated in log LR, the vertex included; clipped to the grid.
        plateau_open: whether the plateau reaches an end of the grid ("at least").
    """

    lr: float
    lr_low: float
    lr_high: float
    score: float
    score_low: float
    score_high: float
    plateau_low: float
    plateau_high: float
    plateau_open: bool

    @property
    def plateau_factor(self) -> float:
        """Return the width of the plateau as a ratio of learning rates."""
        return self.plateau_high / self.plateau_low


def fit_peak(
    lrs: np.ndarray,
    scores: np.ndarray,
    drop: float,
    rng: np.random.Generator,
    higher_is_better: bool = True,
    items: np.ndarray | None = None,
    level: float = 0.95,
    n_draws: int = 1000,
) -> Peak | None:
    """Return the peak of a learning-rate curve, or None without a finite point.

    A parabola in log LR is fitted by least squares to the best point and up to two neighbours on
    each side that do not fall off the plateau by more than half of the curve's range; its vertex
    is clipped to those points. The bootstrap resamples seeds (spread by sqrt(S / (S - 1))) and,
    where scores per item are given, items.

    Args:
        lrs: [L], ascending. scores: [L, S], nan for a diverged or missing run.
        drop: how far below the best a point may be and still count as plateau (say, the margin).
        items: [L, S, I] or None.

    Source: quadratic refinement of a coarse grid, after arXiv 2602.04998's protocol of four values
    per decade; resampling as in Efron and Tibshirani (1993).
    """
    x = np.log10(np.asarray(lrs, dtype=float))
    sign = 1.0 if higher_is_better else -1.0
    y = sign * np.asarray(scores, dtype=float)
    mean = _nanmean(y)
    if not np.isfinite(mean).any():
        return None
    vertex, height = _vertex(x, mean)
    draws = _resampled_curves(y, None if items is None else sign * items, mean, rng, n_draws)
    fits = np.array([_vertex(x, curve) for curve in draws])
    q = [0.5 - level / 2, 0.5 + level / 2]
    low, high = np.quantile(fits[:, 0], q)
    bounds = np.sort(sign * np.quantile(fits[:, 1], q))
    left, right, is_open = _plateau(x, mean, drop)
    return Peak(
        lr=10**vertex,
        lr_low=float(10 ** min(low, vertex)),
        lr_high=float(10 ** max(high, vertex)),
        score=sign * height,
        score_low=float(bounds[0]),
        score_high=float(bounds[1]),
        plateau_low=10 ** min(left, vertex),
        plateau_high=10 ** max(right, vertex),
        plateau_open=is_open,
    )


def _nanmean(y: np.ndarray) -> np.ndarray:
    """Return the mean over seeds [L]; nan only where no seed finished."""
    n = np.isfinite(y).sum(axis=1)
    return np.where(n > 0, np.nansum(y, axis=1) / np.maximum(n, 1), np.nan)


def _vertex(x: np.ndarray, mean: np.ndarray) -> tuple[float, float]:
    """Return (log10 LR, height) at the top of the parabola around the best point of `mean` [L]."""
    best = int(np.nanargmax(mean))
    span = mean[best] - np.nanmin(mean)
    window = [best]
    for step in (-1, 1):
        for j in (best + step, best + 2 * step):
            if not 0 <= j < x.size or not mean[j] >= mean[best] - span / 2:
                break
            window.append(j)
    # A parabola needs three points; the direct neighbours complete it even where they are low.
    for j in (best - 1, best + 1):
        if len(window) < 3 and 0 <= j < x.size and np.isfinite(mean[j]) and j not in window:
            window.append(j)
    if len(window) < 3:
        return float(x[best]), float(mean[best])
    at = np.sort(np.array(window))
    a, b, c = np.polyfit(x[at] - x[best], mean[at], 2)
    if a >= 0:
        return float(x[best]), float(mean[best])
    top = float(np.clip(-b / (2 * a), x[at[0]] - x[best], x[at[-1]] - x[best]))
    return float(x[best] + top), float(a * top**2 + b * top + c)


def _resampled_curves(
    y: np.ndarray,
    items: np.ndarray | None,
    mean: np.ndarray,
    rng: np.random.Generator,
    n_draws: int,
) -> np.ndarray:
    """Return bootstrap replicas [n_draws, L] of the mean curve."""
    n_seeds = y.shape[1]
    weights = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), n_draws).astype(float)
    known = np.isfinite(y)
    total = weights @ np.where(known, y, 0.0).T
    count = weights @ known.T.astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        curves = np.where(count > 0, total / count, mean)
    if n_seeds > 1:
        curves = mean + (curves - mean) * np.sqrt(n_seeds / (n_seeds - 1))
    if items is not None and items.shape[2] > 1:
        kept = np.where(known[..., None], np.nan_to_num(items), 0.0)
        effect = kept.sum(axis=1) / np.maximum(known.sum(axis=1), 1)[:, None]
        effect = effect - effect.mean(axis=1, keepdims=True)
        curves = curves + resampled_means(effect, rng, n_draws)
    return curves


def _plateau(x: np.ndarray, mean: np.ndarray, drop: float) -> tuple[float, float, bool]:
    """Return (left, right, open) of the range around the best point that stays above best - drop.

    Between a finite point and a diverged one the plateau ends at the finite one.
    """
    best = int(np.nanargmax(mean))
    floor = mean[best] - drop
    ends, is_open = [], False
    for step in (-1, 1):
        j = best
        while 0 <= j + step < x.size and mean[j + step] >= floor:
            j += step
        k = j + step
        if not 0 <= k < x.size:
            is_open = True
            ends.append(float(x[j]))
        elif not np.isfinite(mean[k]):
            ends.append(float(x[j]))
        else:
            part = (mean[j] - floor) / (mean[j] - mean[k])
            ends.append(float(x[j] + part * (x[k] - x[j])))
    return ends[0], ends[1], is_open
