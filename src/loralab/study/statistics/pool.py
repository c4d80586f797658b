"""Seed variance borrowed across methods: two or three seeds of one method say too little alone."""

import math

import numpy as np
from scipy import special


def pooled_seed_variance(means: np.ndarray, baseline: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (variances, degrees of freedom), each [M], of seed-wise differences to the baseline.

    Seeds are blocks (they share data order and initial draws), so x[m, s] = mu_m + c_s + e_ms and a
    difference of two arms varies by twice the error variance, estimated from all arms with
    (M - 1)(S - 1) degrees of freedom. How far each arm's own variance is drawn to that pool is
    itself estimated: wholly where spreads agree, less where arms plainly differ.

    Simulated coverage of 95 % intervals with ten arms and two, three or five seeds is 94 to 97 %
    where spreads agree, at half the width or less that two seeds alone give. One arm four times as
    noisy as all others is covered in 78, 81 and 88 % only.

    Args:
        means: x [M arms, S seeds >= 2], without nan.

    Sources: randomised blocks, Fisher (1935); moderated variances, Smyth (2004), "Linear models and
    empirical Bayes methods", section 6.2.
    """
    x = np.asarray(means, dtype=float)
    n_arms, n_seeds = x.shape
    free = n_seeds - 1
    own = np.var(x - x[baseline], axis=1, ddof=1)
    if n_arms < 4:
        return own, np.full(n_arms, float(free))
    e = x - x.mean(axis=1, keepdims=True) - x.mean(axis=0, keepdims=True) + x.mean()
    pool_free = (n_arms - 1) * free
    pool = 2 * float(np.sum(e**2)) / pool_free
    if pool == 0:
        return own, np.full(n_arms, float(free))
    prior = min(
        _prior_strength(np.sum(e**2, axis=1) / free * n_arms / (n_arms - 1), free), pool_free
    )
    return (prior * pool + free * own) / (prior + free), np.full(
        n_arms, min(prior + free, pool_free)
    )


def _prior_strength(variances: np.ndarray, free: int) -> float:
    """Return Smyth's d0: how many degrees of freedom the pool is worth beside `free` of its own."""
    positive = variances[variances > 1e-12 * variances.max()]
    if positive.size < 3:
        return 0.0
    z = np.log(positive)
    excess = float(np.var(z, ddof=1) - special.polygamma(1, free / 2))
    return math.inf if excess <= 0 else 2 * _trigamma_inverse(excess)


def _trigamma_inverse(y: float) -> float:
    """Return x > 0 with trigamma(x) = y, by Newton's method on 1 / trigamma."""
    x = 0.5 + 1 / y
    for _ in range(50):
        value = float(special.polygamma(1, x))
        step = value * (1 - value / y) / float(special.polygamma(2, x))
        x += step
        if abs(step) < 1e-10 * x:
            break
    return x
