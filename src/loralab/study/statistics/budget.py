"""What a method reaches when only some of its learning rates may be tried."""

from math import comb

import numpy as np


def expected_best(values: np.ndarray, higher_is_better: bool = True) -> np.ndarray:
    """Return E[best of n] for n = 1..N over random subsets of the N tried points, [N].

    The unbiased estimator sum_i v_(i) C(i - 1, n - 1) / C(N, n) (arXiv 2004.13705, which shows the
    bias of the plug-in of arXiv 1909.03004). On a grid it reads "n of the N learning rates, drawn
    at random without replacement"; n = N is the best of the grid. A diverged point must be given
    a value by the caller: leaving it out would hide what tuning costs.
    """
    values = np.asarray(values, dtype=float)
    sign = 1.0 if higher_is_better else -1.0
    ranked = np.sort(sign * values)
    n_all = ranked.size
    weights = np.array(
        [[comb(i, n - 1) / comb(n_all, n) for i in range(n_all)] for n in range(1, n_all + 1)]
    )
    return sign * (weights @ ranked)
