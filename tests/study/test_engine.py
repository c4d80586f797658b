import dataclasses
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loralab.errors import UserError
from loralab.study.guards import only_one
from loralab.study.results import load_results
from loralab.study.run import run_study
from loralab.study.status import study_status
from loralab.study.store import Store
from tests.study import fake

SPEC = """
task = "fake"
methods = ["lora", {name = "pissa", lr_shift = -2}]
lr = {start = 1e-4, stop = 1e-1, per_decade = 2}
seeds = 2
confirm_seeds = 2
steps = 5
curvature = true
"""


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(SPEC)
    return path


def run(spec, out, backend=fake.BACKEND, **options):
    run_study(spec, out, max_slots=4, backend=backend, **{"workers": 1} | options)
    return load_results(out)


def refuse(*args, **kwargs):
    raise AssertionError("nothing should be trained")


def test_a_study_selects_confirms_and_tests_once(spec, tmp_path):
    found = run(spec, tmp_path / "out")
    best = {choice.label: choice for choice in found.choices}
    assert best["lora"].best_lr == 1e-3 and best["pissa"].best_lr == 1e-4
    assert not any(choice.lower_bound for choice in found.choices)
    assert all(r.test is None for r in found.grid)
    assert {(r.label, r.trial.lr, r.trial.seed) for r in found.confirm} == {
        (label, lr, seed) for label, lr in (("lora", 1e-3), ("pissa", 1e-4)) for seed in (2, 3)
    }
    for r in found.confirm:
        assert len(r.test_items) == 5 and r.test == pytest.approx(r.test_items.mean())
    lost = [r for r in found.grid if r.status == "diverged"]
    assert {r.trial.lr for r in lost} == {0.1} and all(r.validation is None for r in lost)
    assert [row["label"] for row in found.curvature] == ["lora", "pissa"]
    assert not list((tmp_path / "out" / "checkpoints").glob("*"))


def test_a_finished_study_runs_nothing_again(spec, tmp_path):
    first = run(spec, tmp_path / "out")
    idle = dataclasses.replace(fake.BACKEND, train_pack=refuse, load_model=refuse)
    assert fake.table(run(spec, tmp_path / "out", idle)) == fake.table(first)


def test_killed_anywhere_the_final_table_is_the_same(spec, tmp_path):
    whole = run(spec, tmp_path / "whole", checkpoint_every=2)
    draw, out, kills = random.Random(7), tmp_path / "killed", 0
    command = [sys.executable, "-m", "tests.study.fake", str(spec), str(out)]
    root = Path(__file__).parents[2]
    while True:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
        for _ in range(draw.randrange(1, 14)):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.stdout.close()
        if child.wait() == 0:
            break
        kills += 1
        if kills == 5:
            assert subprocess.run(command, stdout=subprocess.DEVNULL, cwd=root).returncode == 0
            break
    resumed = [e for e in load_results(out).events if e["kind"] == "resumed"]
    assert len(resumed) >= 3
    assert fake.table(load_results(out)) == fake.table(whole)


def test_finished_trials_are_not_repeated(spec, tmp_path):
    trained = []

    def dies(model, task, trials, **options):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append({t.id for t in trials})
        return fake.train_pack(model, task, trials, **options)

    with pytest.raises(KeyboardInterrupt):
        run(spec, tmp_path / "out", dataclasses.replace(fake.BACKEND, train_pack=dies))
    done = set.union(*trained)
    assert {r.trial.id for r in load_results(tmp_path / "out").trials} == done
    status = study_status(tmp_path / "out")
    assert status.finished is None and status.trials["grid"]["waiting"] > 0

    def watches(model, task, trials, **options):
        assert not done & {t.id for t in trials}
        return fake.train_pack(model, task, trials, **options)

    found = run(spec, tmp_path / "out", dataclasses.replace(fake.BACKEND, train_pack=watches))
    assert len(found.confirm) == 4


def test_running_out_of_memory_halves_the_pack(spec, tmp_path):
    def small(model, task, trials, **options):
        if len(trials) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fake.train_pack(model, task, trials, **options)

    found = run(spec, tmp_path / "out", dataclasses.replace(fake.BACKEND, train_pack=small))
    halved = [e for e in found.events if e["kind"] == "out of memory"]
    assert halved and all(e["into"] == [2, 2] for e in halved if e["trials"] == 4)
    assert len(found.confirm) == 4 and found.environment["finished"]


def test_one_trial_too_large_is_said_and_nothing_is_lost(spec, tmp_path):
    def full(model, task, trials, **options):
        if any(t.method == "pissa" for t in trials):
            raise MemoryError
        return fake.train_pack(model, task, trials, **options)

    with pytest.raises(UserError, match=r"one trial of pissa .* does not fit"):
        run(spec, tmp_path / "out", dataclasses.replace(fake.BACKEND, train_pack=full))
    assert {r.label for r in load_results(tmp_path / "out").trials} == {"lora"}


def test_an_optimum_beyond_the_edge_is_widened_twice_then_a_lower_bound(tmp_path):
    spec = tmp_path / "study.toml"
    spec.write_text(SPEC.replace('"lora",', '"lora", "rslora",'))
    found = run(spec, tmp_path / "out")
    choice = {c.label: c for c in found.choices}["rslora"]
    assert (choice.widened, choice.at_edge, choice.lower_bound) == (2, "low", True)
    assert choice.best_lr == 1e-6  # two points per decade, four points below 1e-4
    assert {c.label: c.widened for c in found.choices if c.label != "rslora"} == {
        "lora": 0,
        "pissa": 0,
    }


def test_the_budget_stops_widening_and_refuses_what_cannot_fit(tmp_path):
    spec = tmp_path / "study.toml"
    one = SPEC.replace('["lora", {name = "pissa", lr_shift = -2}]', '["rslora"]')
    spec.write_text(one + "budget = {trials = 18}\n")
    found = run(spec, tmp_path / "out")  # 7 x 2 grid + 2 confirm; the first widening fits no more
    assert len(found.trials) == 16 and found.choices[0].lower_bound
    assert [e["not_widened"] for e in found.events if e["kind"] == "budget"] == [["rslora/8/16"]]
    spec.write_text(one + "budget = {tokens = 1000}\n")
    with pytest.raises(UserError, match="16 trials and about 3840 tokens"):
        run(spec, tmp_path / "other")


def test_another_spec_in_the_same_folder_is_refused(spec, tmp_path):
    run(spec, tmp_path / "out")
    spec.write_text(SPEC.replace("steps = 5", "steps = 6"))
    with pytest.raises(UserError, match="other values of steps; give the new study a folder"):
        run(spec, tmp_path / "out")


def test_a_database_by_url_serves_as_well(tmp_path):
    spec, url = tmp_path / "study.toml", f"sqlite:///{tmp_path}/elsewhere.db"
    spec.write_text(f'store = "{url}"\n{SPEC}')
    found = run(spec, tmp_path / "out")
    assert len(found.confirm) == 4 and not (tmp_path / "out" / "study.sqlite").exists()
    assert fake.table(load_results(url)) == fake.table(found)


def test_only_the_grid_stops_early(tmp_path):
    spec, seen = tmp_path / "study.toml", []
    spec.write_text(f"early_stop = true\n{SPEC}")

    def watches(model, task, trials, **options):
        seen.append(({t.seed for t in trials} <= {0, 1}, options["early_stop"] is not None))
        return fake.train_pack(model, task, trials, **options)

    run(spec, tmp_path / "out", dataclasses.replace(fake.BACKEND, train_pack=watches))
    assert set(seen) == {(True, True), (False, False)}


def test_only_one_process_runs_a_study(spec, tmp_path):
    (tmp_path / "out").mkdir()
    with only_one(tmp_path / "out"), pytest.raises(UserError, match="another process"):
        run(spec, tmp_path / "out")


def test_a_failed_curvature_does_not_cost_the_study(spec, tmp_path):
    def fails(model, task, trials, way):
        if "lora" in trials:
            raise NotImplementedError("no second derivative")
        return fake.BACKEND.curvature(model, task, trials, way)

    found = run(spec, tmp_path / "out", dataclasses.replace(fake.BACKEND, curvature=fails))
    assert [r["label"] for r in found.curvature] == ["pissa"] and len(found.confirm) == 4
    failed = [(e["label"], e["cause"]) for e in found.events if e["kind"] == "curvature failed"]
    assert failed == [("lora", "no second derivative")]


def test_a_full_disk_is_one_sentence(spec, tmp_path):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device; what is stored already stays"):
        run(spec, tmp_path / "out", dataclasses.replace(fake.BACKEND, train_pack=full))


def test_a_store_that_refuses_is_one_sentence(spec, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "study.sqlite").write_text("this is no database, whatever it says" * 50)
    with pytest.raises(UserError, match=r"study\.sqlite cannot be used"):
        run(spec, tmp_path / "out")
    with pytest.raises(UserError, match="there is no study in"):
        Store.open(tmp_path)
