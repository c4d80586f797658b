"""The verdict's sentences and tables, on a make-believe study whose truth is known."""

import dataclasses
import itertools
import math
import re

import pytest

from loralab.report import verdict_sentences, verdict_table
from loralab.report.data import report_data
from tests.report.synthetic import METHODS, synthetic_results

MANY = tuple(range(100, 112))


@pytest.fixture(scope="module")
def decided():
    """Twelve fresh seeds and 1500 items: enough for verdicts."""
    return synthetic_results(confirm_seeds=MANY, n_items=1500)


def arms_of(results):
    return {arm.label: arm for arm in report_data(results).arms}


def test_enough_seeds_find_the_planted_truth(decided):
    arms = arms_of(decided)
    verdicts = {label: arm.comparison.verdict for label, arm in arms.items()}
    assert verdicts["lora"] == "baseline"
    assert verdicts["hydralora"] == "better"
    assert verdicts["vera"] == verdicts["loha"] == "worse"
    assert "equivalent" in verdicts.values()
    for label, (best, _, _) in METHODS.items():
        assert abs(math.log10(arms[label].peak.lr / best)) < 0.3, label
    assert 6 < 1 / arms["pissa"].lr_ratio.estimate < 13


def test_headline_counts_every_method_once(decided):
    headline = verdict_sentences(decided)[0]
    counts = re.findall(
        r"(\d+)(?: of 9 methods)? (?:is|are) (?:within|better|worse|undecided)", headline
    )
    assert sum(map(int, counts)) == 9
    assert "12 fresh seeds" in headline
    assert any(s.startswith("vera wants") and "pissa" in s for s in verdict_sentences(decided))


def test_few_seeds_stay_undecided_and_say_what_is_missing():
    results = synthetic_results(("lora", "dora", "milora", "pissa"), confirm_seeds=(5,))
    assert {a.comparison.verdict for a in arms_of(results).values()} == {"baseline", "undecided"}
    said = " ".join(verdict_sentences(results))
    assert "second seed" in said and "Too few seeds: 1" in said
    three = " ".join(verdict_sentences(synthetic_results()))
    assert re.search(r"dora \(about \d+ seeds, now 3\)", three)


def test_lower_is_better_turns_every_comparison():
    arms = arms_of(synthetic_results(nll=True))
    better, worse = arms["hydralora"].comparison, arms["vera"].comparison
    assert better.final.estimate < arms["lora"].comparison.final.estimate < worse.final.estimate
    assert better.difference.estimate > 0 > worse.difference.estimate
    assert (better.verdict, worse.verdict) == ("better", "worse")
    budget = arms["lora"].best_of
    assert all(a > b for a, b in itertools.pairwise(budget))
    assert budget[-1] == pytest.approx(min(p.mean for p in arms["lora"].curve if p.finite))


def test_a_lost_final_run_cannot_be_called_equivalent_or_better(decided):
    def lose(r):
        if r.label == "hydralora" and r.stage == "confirm" and r.trial.seed == MANY[0]:
            return dataclasses.replace(r, status="diverged", test=None, test_items=None)
        return r

    arm = arms_of(dataclasses.replace(decided, trials=[lose(r) for r in decided.trials]))[
        "hydralora"
    ]
    assert (arm.comparison.verdict, arm.comparison.reason) == ("undecided", "lost runs")


def test_without_confirmation_no_seed_chooses_its_own_learning_rate():
    results = synthetic_results(("lora", "pissa"), confirm_seeds=())
    arm = arms_of(results)["lora"]
    assert arm.comparison.basis == "validation"
    by_seed = {
        seed: {p.lr: dict(zip(p.seeds, p.scores, strict=True))[seed] for p in arm.curve}
        for seed in (0, 1)
    }
    chosen = {
        s: max(by_seed[1 - s], key=lambda lr: -1 if math.isnan(v := by_seed[1 - s][lr]) else v)
        for s in (0, 1)
    }
    mean = sum(by_seed[s][chosen[s]] for s in (0, 1)) / 2
    assert arm.comparison.final.estimate == pytest.approx(mean)


def test_edges_and_failures_are_named(decided):
    choices = [
        dataclasses.replace(c, at_edge="high", lower_bound=True, widened=2)
        if c.label == "vera"
        else c
        for c in decided.choices
    ]
    said = " ".join(verdict_sentences(dataclasses.replace(decided, choices=choices)))
    assert "Lower bound only, best at the edge of the grid: vera (high end)." in said
    diverged = sum(r.status == "diverged" and r.stage == "grid" for r in decided.trials)
    assert f"{diverged} grid trials diverged" in said


def test_an_unfinished_study_is_reported_without_guessing(decided):
    for n in (0, 1, 7, 60):
        part = dataclasses.replace(decided, trials=decided.trials[:n], choices=[], curvature=[])
        assert verdict_sentences(part)[0]
        verdict_table(part)


def test_curvature_is_ranked_against_the_best_rate(decided):
    rho = report_data(decided).groups[0].correlation
    assert rho.n == 10 and rho.estimate < -0.8 and rho.high < 0
    assert any(s.startswith("The sharper the start") for s in verdict_sentences(decided))


def test_terminal_table_has_a_row_per_method_and_a_section_per_rank():
    results = synthetic_results(("lora", "pissa"), ranks=(4, 16))
    table = verdict_table(results)
    assert table.row_count == 4
    assert [column.header for column in table.columns][:3] == ["rank", "batch", "method"]
