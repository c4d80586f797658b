"""Files that a report writes: page, CSV and figures."""

import copy
import csv
import json
import re

import plotly.graph_objects as go
import pytest

from loralab.errors import UserError
from loralab.report import charts, write_report
from loralab.report.data import report_data
from tests.report.synthetic import synthetic_results


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    results = synthetic_results(("lora", "pissa", "dora", "vera"))
    results.spec["note"] = "</script><b>not markup</b>"
    return write_report(folder, results), results


def test_every_trial_is_in_the_csv(report):
    page, results = report
    with (page.parent / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == [r.trial.id for r in results.trials]
    first = next(r for r in results.trials if r.validation is not None)
    row = next(row for row in rows if row["trial"] == first.trial.id)
    assert float(row["lr"]) == first.trial.lr
    assert float(row["validation"]) == first.validation
    assert next(row for row in rows if row["status"] == "diverged")["validation"] == ""


def test_summary_agrees_with_the_tables(report):
    page, results = report
    with (page.parent / "summary.csv").open(encoding="utf-8") as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    for arm in report_data(results).arms:
        assert rows[arm.label]["verdict"] == arm.comparison.verdict
        assert float(rows[arm.label]["fitted_lr"]) == arm.peak.lr


def test_figures_are_written_as_png_and_svg(report):
    folder = report[0].parent / "figures"
    stems = {"lr_curves", "lr_curves_each", "best_lr", "differences", "budget", "cost", "curvature"}
    assert {path.stem for path in folder.glob("*.svg")} == stems
    for stem in stems:
        assert (folder / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (folder / f"{stem}.svg").read_bytes()


def test_page_needs_nothing_from_elsewhere_and_escapes_what_it_is_given(report):
    text = report[0].read_text("utf-8")
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert not re.search(r"(?:src|srcset|action)\s*=\s*[\"']?(?:https?:)?//", markup)
    assert not re.search(r"<link[^>]*href=[\"']https?:", markup)
    assert "default-src 'none'" in markup
    assert "<b>not markup</b>" not in text
    assert "&lt;b&gt;not markup" in markup
    assert text.count("<noscript><img") == 5


@pytest.mark.parametrize("maker", ["lr_curves", "best_lr", "differences", "budget", "curvature"])
def test_charts_are_valid_plotly(report, maker):
    data = report_data(report[1])
    chart = getattr(charts, maker)(data, data.groups[0])
    themed = json.loads(re.sub(r'"@\w+"', '"#123456"', json.dumps(chart)))
    figure = go.Figure(copy.deepcopy(themed))
    assert len(figure.data) == len(chart["data"]) > 0


def test_a_study_without_trials_still_has_a_page(tmp_path):
    results = synthetic_results(("lora",))
    results.trials.clear()
    results.choices.clear()
    text = write_report(tmp_path, results).read_text("utf-8")
    assert "No trial has finished yet." in text


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(tmp_path / "file", synthetic_results(("lora",)))
