"""The exam of `loralab.testing` over the whole catalogue; a new method adds no line here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loralab.methods import all_methods
from loralab.testing import CHECKS, fingerprint
from loralab.testing.toy import inputs, trained_adapter

NAMES = list(all_methods())
GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_conformance(name, check):
    check(name)


@pytest.mark.parametrize("name", NAMES)
def test_golden_record(name):
    path = GOLDEN / f"{name}.json"
    assert path.exists(), f"no golden record of {name}: run `make golden` and look at the numbers"
    wanted, found = json.loads(path.read_text()), fingerprint(name)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-7, abs=1e-10), f"{key} of {name} changed"


def test_every_golden_record_has_a_method():
    assert {p.stem for p in GOLDEN.glob("*.json")} == set(NAMES)


ELSEWHERE = """
import json, sys, torch
from pathlib import Path
from loralab import load
from loralab.methods import all_methods
from loralab.testing import fingerprint
from loralab.testing.toy import ToyModel, inputs, toy_trial, train, slot_tensors

folder, found = Path(sys.argv[1]), {}
for name in all_methods():
    model = ToyModel()
    load(model, folder / name)
    tensors = slot_tensors(train([toy_trial(name, steps=3)]), 0)
    found[name] = {
        "loaded": model(inputs()).flatten().tolist(),
        "trained": {n: t.double().sum().item() for n, t in tensors.items()},
        "fingerprint": fingerprint(name),
    }
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Save every method here; load it, train it and take its fingerprint in one other process."""
    folder, wanted = tmp_path_factory.mktemp("adapters"), {}
    for name in NAMES:
        adapter = trained_adapter(name)
        adapter.save(folder / name)
        wanted[name] = adapter.model(inputs())
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(folder)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return wanted, json.loads(run.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_another_process_loads_the_same_adapter(elsewhere, name):
    wanted, found = elsewhere
    torch.testing.assert_close(torch.tensor(found[name]["loaded"]), wanted[name].flatten())


@pytest.mark.parametrize("name", NAMES)
def test_another_process_trains_the_same_adapter(elsewhere, name):
    from loralab.testing.toy import slot_tensors, toy_trial, train

    here = slot_tensors(train([toy_trial(name, steps=3)]), 0)
    there = elsewhere[1][name]
    assert {n: t.double().sum().item() for n, t in here.items()} == there["trained"]
    assert fingerprint(name) == there["fingerprint"]
