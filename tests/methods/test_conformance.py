"""The exam of `loralab.testing` over the whole catalogue; a new method adds no line here."""

import json
import os
import subprocess
import sys

import pytest
import torch

from loralab.methods import all_methods
from loralab.testing import CHECKS, fingerprint
from loralab.testing.toy import inputs, kinds, trained_adapter, trained_bits

NAMES = list(all_methods())
KINDS = list(dict.fromkeys(kind for name in NAMES for kind in kinds(name)))
SLOW = ("Conv2d", "Embedding")  # a minute for both; the fast tests have the others


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_conformance(name, check):
    check(name)


ELSEWHERE = """
import json, sys
from pathlib import Path
from loralab import load
from loralab.testing import fingerprint
from loralab.testing.toy import ToyModel, inputs, trained_bits

folder, kind, found = Path(sys.argv[1]), sys.argv[2], {}
for name in sys.argv[3:]:
    model = ToyModel(kind=kind).eval()
    load(model, folder / name)
    found[name] = {
        "loaded": model(inputs()).flatten().tolist(),
        "trained": trained_bits(name, kind),
        "fingerprint": fingerprint(name),
    }
json.dump(found, sys.stdout)
"""


def check_another_process(names, folder, kind, before=""):
    """One process for all names: loading there what is saved here, same seeds, same bits.

    Text hashes otherwise there, so that sets have another order. `before` is code to begin with.
    """
    outputs = {}
    for name in names:
        adapter = trained_adapter(name, kind=kind)
        adapter.save(folder / name)
        outputs[name] = adapter.model(inputs()).flatten()
    run = subprocess.run(
        [sys.executable, "-c", before + ELSEWHERE, str(folder), kind, *names],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for name, found in json.loads(run.stdout).items():
        torch.testing.assert_close(torch.tensor(found["loaded"]), outputs[name], msg=name)
        assert trained_bits(name, kind) == found["trained"], name
        assert fingerprint(name) == found["fingerprint"], name


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW)) for k in KINDS]
)
def test_another_process_loads_and_trains_the_same(tmp_path, kind):
    check_another_process([n for n in NAMES if kind in kinds(n)], tmp_path, kind)
