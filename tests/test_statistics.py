"""Statistics against closed forms and simulations with known truth."""

from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from loralab.study.statistics import (
    bootstrap_interval,
    expected_best,
    fit_peak,
    holm,
    paired_difference,
    pooled_seed_variance,
    pooled_t_intervals,
    seeds_needed,
    spearman,
    t_interval,
    verdict,
)


def rng(*key):
    return np.random.default_rng([7, *key])


def test_t_interval_is_scipys_and_leaves_out_what_is_missing():
    x = rng().normal(size=7)
    low, high = stats.t.interval(0.95, 6, x.mean(), stats.sem(x))
    got = t_interval(np.append(x, np.nan))
    assert (got.low, got.high, got.n) == (pytest.approx(low), pytest.approx(high), 7)
    assert np.isnan(t_interval(x[:1]).low)


def test_bootstrap_interval_comes_close_to_the_normal_one():
    x = rng(1).normal(size=200)
    got = bootstrap_interval(x, rng(2))
    assert got.high - got.low == pytest.approx(2 * 1.96 * stats.sem(x), rel=0.05)


def crossed(key, n_seeds, n_items, sd_seed, sd_item, sd_rest):
    g = rng(*key)
    return (
        sd_seed * g.normal(size=(n_seeds, 1))
        + sd_item * g.normal(size=(1, n_items))
        + sd_rest * g.normal(size=(n_seeds, n_items))
    )


@pytest.mark.parametrize(
    ("n_seeds", "sds"), [(2, (0.02, 0.2, 0.4)), (3, (0.0, 0.1, 0.5)), (10, (0.05, 0.0, 0.3))]
)
def test_paired_interval_covers_the_truth(n_seeds, sds):
    """Nominal 95 %; the standard error of 300 draws is 1.3 %, few seeds err on the safe side."""
    hits = rejected = 0
    for i in range(300):
        d = paired_difference(crossed((i, n_seeds), n_seeds, 100, *sds), 0.01, rng(i), n_draws=400)
        hits += d.low <= 0 <= d.high
        rejected += d.p_difference < 0.05
    assert hits / 300 > 0.91
    assert rejected / 300 < 0.09


def test_pairing_removes_what_both_arms_share():
    g = rng(3)
    shared = g.normal(0, 0.3, (3, 1)) + g.normal(0, 1, (1, 200))
    a = shared + g.normal(0, 0.05, (3, 200))
    b = shared + g.normal(0, 0.05, (3, 200)) - 0.1
    d = paired_difference(a - b, 0.01, rng(4))
    unpaired = np.hypot(stats.sem(a.mean(axis=1)), stats.sem(b.mean(axis=1)))
    assert d.estimate == pytest.approx(0.1, abs=0.02)
    assert d.se < unpaired / 10
    assert d.p_difference < 0.001


def test_variance_components_are_those_of_the_table():
    """One item: the paired t test. One seed: the t test over items."""
    x = rng(5).normal(0.3, 1, 6)
    reference = stats.ttest_1samp(x, 0)
    for d in (x[:, None], x[None, :]):
        got = paired_difference(d, 0.1, rng(6))
        assert got.p_difference == pytest.approx(reference.pvalue)
    e = crossed((8,), 400, 400, 0.3, 0.2, 0.5)
    got = paired_difference(e, 0.1, rng(6), n_draws=10)
    found = np.sqrt([got.var_seed, got.var_item, got.var_residual])
    assert found == pytest.approx([0.3, 0.2, 0.5], rel=0.1)


def test_pool_is_the_block_design_where_spreads_agree_and_lets_go_where_they_do_not():
    g = rng(9)
    alike = [pooled_seed_variance(g.normal(0, 0.1, (10, 3)), 0) for _ in range(200)]
    variances = np.array([v[3] for v, _ in alike])
    assert variances.mean() == pytest.approx(2 * 0.1**2, rel=0.1)
    assert variances.std() < 0.5 * variances.mean()  # an arm's own, with 2 degrees of freedom: 1
    sds = np.geomspace(0.01, 1, 10)[:, None]
    far = [pooled_seed_variance(sds * g.normal(0, 1, (10, 5)), 0) for _ in range(50)]
    assert np.median([v[9] / v[1] for v, _ in far]) > 3


def test_holm_by_hand():
    got = holm(np.array([0.01, 0.04, 0.03, np.nan, 0.5]))
    assert got == pytest.approx([0.04, 0.09, 0.09, np.nan, 0.5], nan_ok=True)


def test_verdicts():
    assert verdict(0.5, 0.001, 0.9) == "better"
    assert verdict(-0.5, 0.001, 0.9) == "worse"
    assert verdict(-0.002, 0.001, 0.01) == "equivalent"
    assert verdict(0.2, 0.3, 0.4) == "undecided"


def test_equivalence_is_claimed_wrongly_no_more_than_alpha():
    """At the margin itself TOST may say "equivalent" in 5 % of the cases."""
    said = 0
    for i in range(300):
        d = 0.05 + crossed((i, 1), 3, 100, 0.02, 0.1, 0.2)
        said += paired_difference(d, 0.05, rng(i), n_draws=10).p_equivalence < 0.05
    assert said / 300 < 0.09


def test_as_many_seeds_as_named_decide_about_half_of_the_time():
    few = paired_difference(0.06 + crossed((12,), 4, 500, 0.05, 0.0, 0.1), 0.001, rng(12))
    n = seeds_needed(few, 0.001)
    assert n is not None and few.p_difference > 0.05 and n > 4
    sds = (np.sqrt(few.var_seed), np.sqrt(few.var_item), np.sqrt(few.var_residual))
    wins = [
        paired_difference(few.estimate + crossed((i, 14), n, 500, *sds), 0.001, rng(i), n_draws=10)
        for i in range(100)
    ]
    assert 0.3 < np.mean([d.p_difference < 0.05 for d in wins]) < 0.8
    assert seeds_needed(paired_difference(crossed((15,), 1, 50, 0, 0, 1), 0.1, rng(1)), 0.1) is None


def test_expected_best_is_the_mean_over_all_subsets():
    values = np.array([0.3, 0.1, 0.8, 0.5, 0.5])
    for sign, best in ((True, max), (False, min)):
        exact = [np.mean([best(c) for c in combinations(values, n)]) for n in range(1, 6)]
        assert expected_best(values, sign) == pytest.approx(exact)


@pytest.mark.parametrize("sign", [1, -1])
def test_peak_of_a_parabola_is_found_between_grid_points(sign):
    lrs = np.logspace(-4, 0, 33)
    curve = 0.8 - 0.3 * (np.log10(lrs) + 2.2) ** 2
    scores = sign * (curve[:, None] + np.zeros((33, 3)))
    peak = fit_peak(lrs, scores, 0.05, rng(1), higher_is_better=sign > 0)
    assert np.log10(peak.lr) == pytest.approx(-2.2)
    assert peak.score == pytest.approx(sign * 0.8)
    assert peak.lr_low == pytest.approx(peak.lr_high)
    assert not peak.plateau_open
    # The best grid point is -2.25; within 0.05 of it lies -2.2 +- sqrt(0.05 / 0.3 + 0.05^2).
    half = np.sqrt(0.05 / 0.3 + 0.05**2)
    assert np.log10(peak.plateau_factor) == pytest.approx(2 * half, abs=0.02)


def test_peak_interval_covers_and_survives_divergence():
    lrs = np.logspace(-3, -1, 9)
    truth, hits = -2.1, 0
    curve = 0.8 - 0.3 * (np.log10(lrs) - truth) ** 2
    for i in range(60):
        scores = curve[:, None] + rng(i).normal(0, 0.02, (9, 5))
        scores[-1] = np.nan
        peak = fit_peak(lrs, scores, 0.02, rng(i, 1), n_draws=300)
        hits += np.log10(peak.lr_low) <= truth <= np.log10(peak.lr_high)
    assert hits / 60 > 0.8
    assert fit_peak(lrs, np.full((9, 2), np.nan), 0.02, rng(1)) is None


def test_best_point_at_the_end_of_the_grid_leaves_the_plateau_open():
    lrs = np.logspace(-3, -1, 5)
    peak = fit_peak(lrs, np.arange(5.0)[:, None] * 0.1, 0.05, rng(1))
    assert peak.plateau_open
    assert peak.lr == pytest.approx(0.1)


def test_spearman_interval():
    x = np.arange(10.0)
    y = np.array([1, 0, 2, 4, 3, 5, 7, 6, 9, 8.0])
    got = spearman(x, y)
    assert got.estimate == pytest.approx(stats.spearmanr(x, y).statistic)
    half = 1.96 * np.sqrt((1 + got.estimate**2 / 2) / 7)
    assert np.arctanh([got.low, got.high]) == pytest.approx(
        np.arctanh(got.estimate) + np.array([-half, half]), rel=1e-3
    )
    perfect = spearman(x[:4], -x[:4])
    assert perfect.estimate == pytest.approx(-1)
    assert perfect.high > 0  # four points in perfect order prove little
    assert np.isnan(spearman(x, np.ones(10)).estimate)


def test_pooled_intervals_share_the_spread_of_all_groups():
    rng = np.random.default_rng(5)
    groups = [rng.normal(0, 1, 2) for _ in range(50)] + [np.array([3.0])]
    found = pooled_t_intervals(groups)
    widths = [i.high - i.low for i in found]
    assert np.ptp(widths[:50]) < 1e-12
    assert widths[50] == pytest.approx(np.sqrt(2) * widths[0])
    assert sum(i.low <= 0 <= i.high for i in found[:50]) >= 43  # 95 % of 50, four sigma off
    alone = pooled_t_intervals(groups[:2])
    assert alone == [t_interval(g) for g in groups[:2]]
