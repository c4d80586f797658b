"""Properties of a pack: no slot sees its neighbours."""

import torch
from torch import Tensor

from loralab.methods import build
from loralab.recipe import Recipe
from loralab.testing.toy import kinds, on_every_kind, slot_tensors, toy_trial, train


def check_packed_equals_alone(
    name: str | Recipe, tolerance: float = 1e-5, exact: float = 1e-9, steps: int = 20
) -> None:
    """Packed equals alone after 20 steps, under permutation and subset of the pack.

    In fp64 to `exact` relative, which proves that the computation is the same one; in fp32 to
    `tolerance`. A Rule that declares `inverts` may be off by eight times its own rounding, the
    distance of the lone fp32 run from the lone fp64 run.
    """
    own_rounding = 8 * build(name).rule.inverts
    trials = [
        toy_trial(name, steps, lr=3e-3, seed=0),
        toy_trial(name, steps, lr=1e-3, seed=1, batch_size=6),
        toy_trial(name, steps, lr=2e-3, seed=0, weight_decay=0.1, clip=0.1, alpha=6.0),
    ]
    lone = [slot_tensors(train([t], torch.float64), 0) for t in trials]
    alone = [slot_tensors(train([t]), 0) for t in trials]
    for order in ([2, 0, 1], [1, 2]):
        in64 = train([trials[i] for i in order], torch.float64)
        in32 = train([trials[i] for i in order])
        for at, i in enumerate(order):
            for n, value in slot_tensors(in64, at).items():
                gap = _gap(value, lone[i][n])
                assert gap <= exact, f"{n} of trial {i} in {order} is off by {gap:.1e} in fp64"
            for n, value in slot_tensors(in32, at).items():
                allowed = max(tolerance, own_rounding * _gap(alone[i][n], lone[i][n]))
                gap = _gap(value, alone[i][n])
                assert gap <= allowed, f"{n} of trial {i} in {order} is off by {gap:.1e} in fp32"


def check_packed_equals_alone_on_other_layers(name: str | Recipe, exact: float = 1e-9) -> None:
    """Packed equals alone on every other kind of toy model, in fp64."""
    for kind in kinds(name)[1:]:
        trials = [
            toy_trial(name, steps=4, lr=3e-3, seed=0),
            toy_trial(name, steps=4, lr=1e-3, seed=1, batch_size=6),
        ]
        packed = train(trials, torch.float64, kind)
        for i, trial in enumerate(trials):
            alone = slot_tensors(train([trial], torch.float64, kind), 0)
            for n, value in slot_tensors(packed, i).items():
                gap = _gap(value, alone[n])
                assert gap <= exact, f"{n} of trial {i} is off by {gap:.1e} on {kind}"


def _gap(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b|."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12)).item()


@on_every_kind
def check_divergence_stays_alone(name: str | Recipe, kind: str) -> None:
    """A slot at learning rate 1e6 is marked diverged, and no bit of its neighbours changes."""
    resizes = build(name).schedule.resizes
    good = [toy_trial(name, steps=10, seed=0), toy_trial(name, steps=10, seed=2)]
    runs = [
        train([good[0], toy_trial(name, steps=10, seed=1, lr=lr), good[1]], kind=kind)
        for lr in (1e-3, 1e6)
    ]
    assert [o.status for o in runs[0].outcomes] == ["done"] * 3
    assert [o.status for o in runs[1].outcomes] == ["done", "diverged", "done"]
    assert runs[1].outcomes[1].step <= 4, "the divergence was noticed late"
    for at in (0, 2):
        calm, stormy = slot_tensors(runs[0], at), slot_tensors(runs[1], at)
        for tensor, value in calm.items():
            if resizes:  # the width of a product rounds, and it is the widest slot's
                assert _gap(stormy[tensor], value) <= 1e-5, f"{tensor} of a neighbour changed"
            else:
                assert torch.equal(value, stormy[tensor]), f"{tensor} of a neighbour changed"
        if not resizes:
            assert runs[0].outcomes[at].curve == runs[1].outcomes[at].curve
