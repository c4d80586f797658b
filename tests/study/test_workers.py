"""Studies in several processes: equal numbers, dead workers, dead parents."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from loralab.errors import UserError
from loralab.models.symbols import SymbolTokenizer
from loralab.models.tiny import TinyRecipe, untrained
from loralab.study import Study
from loralab.study.backend import Backend
from loralab.study.crew import Alone
from loralab.study.jobs import PackJob, Reply
from loralab.study.parse import parse
from loralab.study.results import load_results
from tests.study import fake
from tests.study.test_engine import SPEC

REAL = parse(
    {
        "task": "synthetic?n_train=64&n_validation=4&n_test=4&length=4",
        "methods": ["lora", "lora_ga"],
        "lr": [1e-3, 1e-2, 1e9],
        "ranks": [2],
        "batch_sizes": [2],
        "seeds": 2,
        "confirm_seeds": 2,
        "steps": 6,
        "dropout": 0.1,
        "widen": False,
        "curvature": True,
    },
    "study",
)


def small(ref):
    model = untrained(TinyRecipe(layers=1, width=16, heads=2, mlp_width=32)).eval()
    return model, SymbolTokenizer()


def fragile(model, task, trials, **options):
    """Kill this process in the middle of the first pack that holds pissa, once."""
    mark = Path(os.environ["LORALAB_TEST_MARK"])

    def dies(step, n_steps, losses):
        if step == 3 and not mark.exists() and trials[0].method == "pissa":
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    options["progress"] = dies
    return fake.train_pack(model, task, trials, **options)


def slow(model, task, trials, **options):
    progress = options.pop("progress")

    def wait(*news):
        time.sleep(0.2)
        progress(*news)

    return fake.train_pack(model, task, trials, progress=wait, **options)


def unloadable(ref):
    if os.environ.get("LORALAB_TEST_PARENT") == str(os.getpid()):
        return fake.load_model(ref)
    raise UserError("no such model")


def study(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(SPEC)
    return Study(path, tmp_path / "out")


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_same_packs_give_the_same_bits_and_other_packs_the_same_numbers(one_thread, tmp_path):
    backend = Backend(load_model=small)
    options = {"backend": backend, "device": "cpu"}
    alone = Study(REAL, tmp_path / "1").run(max_slots=3, workers=1, **options).results()
    pair = Study(REAL, tmp_path / "2").run(max_slots=3, workers=2, **options).results()
    assert fake.table(pair) == fake.table(alone)
    assert [row["label"] for row in pair.curvature] == ["lora", "lora_ga"]
    assert [r["values"] for r in pair.curvature] == [r["values"] for r in alone.curvature]
    whole = Study(REAL, tmp_path / "3").run(max_slots=12, workers=1, **options).results()
    packed = {e["stage"]: e["packs"] for e in whole.events if e["kind"] == "packed"}
    assert packed["grid"] == 1 and len(whole.trials) == len(pair.trials) == 16
    for one, two in zip(pair.trials, whole.trials, strict=True):
        assert one.trial == two.trial and one.status == two.status
        for (_, a), (_, b) in zip(one.curve, two.curve, strict=True):
            assert a == pytest.approx(b, rel=1e-5, nan_ok=True)


def test_a_worker_that_dies_is_replaced_and_the_table_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("LORALAB_TEST_MARK", str(tmp_path / "mark"))
    backend = dataclasses.replace(fake.BACKEND, train_pack=fragile)
    whole = study(tmp_path).run(max_slots=2, workers=1, backend=fake.BACKEND).results()
    options = {"max_slots": 2, "workers": 2, "checkpoint_every": 2, "backend": backend}
    found = Study(tmp_path / "study.toml", tmp_path / "two").run(**options).results()
    deaths = [event for event in found.events if event["kind"] == "worker died"]
    assert [event["cause"] for event in deaths] == ["signal 9"] and "pissa" in deaths[0]["job"]
    assert fake.table(found) == fake.table(whole)


def test_a_pack_whose_worker_dies_twice_is_halved_down_to_one_trial(tmp_path, monkeypatch):
    take = Alone.take

    def dies(self):
        if isinstance(self.job, PackJob) and self.job.pack.planned[0].label == "pissa":
            job, self.job = self.job, None
            return job, Reply("died", cause="signal 9")
        return take(self)

    monkeypatch.setattr(Alone, "take", dies)
    broken = study(tmp_path)
    with pytest.raises(UserError, match=r"trained one trial of pissa .* ended twice \(signal 9\)"):
        broken.run(max_slots=4, workers=1, backend=fake.BACKEND)
    events = [e for e in broken.results().events if e["kind"] == "worker died"]
    assert [e["into"] for e in events if "into" in e][:2] == [[2, 2], [1, 1]]
    assert len(events) == 3 * 2 + 2
    monkeypatch.undo()  # what was stored stays, the rest runs
    found = broken.run(max_slots=4, workers=1, backend=fake.BACKEND).results()
    assert len(found.confirm) == 4 and found.environment["finished"]


def test_a_model_that_workers_cannot_load_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("LORALAB_TEST_PARENT", str(os.getpid()))
    backend = dataclasses.replace(fake.BACKEND, load_model=unloadable)
    with pytest.raises(UserError, match=r"^no such model"):
        study(tmp_path).run(max_slots=4, workers=2, backend=backend)
    with pytest.raises(UserError, match="--workers must be at least 1, not 0"):
        study(tmp_path).run(workers=0, backend=fake.BACKEND)


@pytest.mark.parametrize("last", [signal.SIGKILL, signal.SIGINT])
def test_a_dead_parent_leaves_no_worker_and_the_table_is_the_same(tmp_path, last):
    whole = study(tmp_path).run(max_slots=4, workers=1, backend=fake.BACKEND).results()
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "tests.study.test_workers", str(tmp_path / "study.toml"), out]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    )
    pids = [int(child.stdout.readline()) for _ in range(2)]
    child.stdout.readline()  # a step has been made
    os.killpg(child.pid, last) if last == signal.SIGINT else child.kill()
    child.stdout.close()
    assert child.stderr.read().count("Traceback") == (last == signal.SIGINT)  # the parent's own
    child.wait()
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))
    assert len(load_results(out).trials) < len(whole.trials)
    found = (
        Study(tmp_path / "study.toml", out)
        .run(max_slots=9, workers=1, backend=fake.BACKEND)
        .results()
    )
    assert fake.table(found) == fake.table(whole)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Watched(fake.Told):
    """Prints the workers' process ids when the first pack begins, then every step."""

    def begin(self, name, n_steps, n_slots):
        import multiprocessing

        if not getattr(self, "told", False):
            self.told = True
            while len(children := multiprocessing.active_children()) < 2:
                time.sleep(0.05)
            print(*(child.pid for child in children), sep="\n", flush=True)
        return self.show.begin(name, n_steps, n_slots)

    def advance(self, line, *news):
        print("step", flush=True)


if __name__ == "__main__":
    from tests.study import test_workers

    backend = dataclasses.replace(fake.BACKEND, train_pack=test_workers.slow)
    options = {"max_slots": 4, "checkpoint_every": 2, "workers": 2, "backend": backend}
    Study(sys.argv[1], sys.argv[2]).run(Watched(), **options)
