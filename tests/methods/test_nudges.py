"""A hundredth off in any hook that returns numbers changes the golden record of some method.

`draw`, `groups`, `before_step` and `next_task` have tests of their own beside their formulas.
"""

import dataclasses
import json
from pathlib import Path

import pytest
from torch import Tensor

from loralab.methods import all_methods
from loralab.recipe import OwnStart
from loralab.testing import fingerprint

GOLDEN = Path(__file__).parent / "golden"


def check_golden(name):
    path = GOLDEN / f"{name}.json"
    assert path.exists(), f"no golden record of {name}: run `make golden` and look at the numbers"
    wanted, found = json.loads(path.read_text()), fingerprint(name)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-7, abs=1e-10), f"{key} of {name} changed"


@pytest.mark.parametrize("name", all_methods())
def test_golden_record(name):
    check_golden(name)


def test_every_golden_record_has_a_method():
    assert {p.stem for p in GOLDEN.glob("*.json")} == set(all_methods())


FORM = "default_alpha scale init factors delta branch inner outer base bias gain penalty"
HOOKS = {
    "form": [*FORM.split(), "aux_loss", "route"],
    "start": ["init", "ranks"],
    "rule": ["lr_ratio", "step"],
    "schedule": ["lr_factor", "after_step", "ranks"],
}


def has(cls, hook):
    """Return whether the class gives the hook, itself or through what its folder shares."""
    shared = [c for c in cls.__mro__ if c.__module__.rpartition(".")[2].startswith("_")]
    return any(hook in c.__dict__ for c in (cls, *shared))


def overridden():
    """Yield every hook that a piece of the catalogue overrides, with a method that has it."""
    seen = set()
    # A Start may replace all that a Form makes, so a Form is tried with its own start if it can be.
    begun = sorted(
        all_methods().items(), key=lambda item: not isinstance(item[1].recipe.start, OwnStart)
    )
    for name, method in begun:
        for kind, piece in method.recipe.pieces.items():
            for hook in HOOKS[kind]:
                key = (type(piece), hook)
                empty = not dataclasses.fields(piece) and key[0].__name__ in (
                    "OwnStart",
                    "NoSchedule",
                )
                if has(*key) and key not in seen and not empty:
                    seen.add(key)
                    yield pytest.param(name, *key, id=f"{name}-{key[0].__name__}.{hook}")


def nudge(value):
    """Return the value a hundredth larger, whatever it is made of."""
    if isinstance(value, dict):
        return {n: nudge(v) for n, v in value.items()}
    if isinstance(value, list):  # of ranks
        return [v + 1 for v in value]
    if isinstance(value, tuple):  # (B, A), or (experts, weights)
        first, second = value
        return (nudge(first), second) if first.is_floating_point() else (first, nudge(second))
    if value is None or (isinstance(value, Tensor) and not value.is_floating_point()):
        return value  # an index is no number to be a little off
    return value * 1.01 + 1e-3


@pytest.mark.parametrize(("name", "cls", "hook"), list(overridden()))
def test_any_change_of_any_formula_changes_the_golden_record(name, cls, hook, monkeypatch):
    """One in a hundred off, in any hook of any piece: a new method is covered without a line."""
    original = getattr(cls, hook)
    monkeypatch.setattr(cls, hook, lambda *args, **kw: nudge(original(*args, **kw)))
    if hook in ("step", "after_step"):
        monkeypatch.setattr(cls, hook, lambda *args: None)
    with pytest.raises(AssertionError):
        check_golden(name)
