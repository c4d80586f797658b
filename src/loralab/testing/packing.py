"""Properties of a pack: no slot sees its neighbours."""

import copy
import tempfile

import torch
from torch import Tensor

from loralab.core.adapter import Adapter, load
from loralab.core.pack import Pack
from loralab.methods import build
from loralab.recipe import Recipe
from loralab.testing.toy import (
    ToyModel,
    inputs,
    kinds,
    main_kinds,
    moved,
    on_every_kind,
    slot_tensors,
    toy_trial,
    train,
)


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
    # The widest slot's rank rounds its neighbours' products: in fp64 that stays small.
    dtype = torch.float64 if resizes else torch.float32
    good = [toy_trial(name, steps=10, seed=0), toy_trial(name, steps=10, seed=2)]
    runs = [
        train([good[0], toy_trial(name, steps=10, seed=1, lr=lr), good[1]], dtype, kind)
        for lr in (1e-3, 1e6)
    ]
    assert [o.status for o in runs[0].outcomes] == ["done"] * 3
    assert [o.status for o in runs[1].outcomes] == ["done", "diverged", "done"]
    assert runs[1].outcomes[1].step <= 4, "the divergence was noticed late"
    for at in (0, 2):
        calm, stormy = slot_tensors(runs[0], at), slot_tensors(runs[1], at)
        for tensor, value in calm.items():
            if resizes:
                assert _gap(stormy[tensor], value) <= 1e-7, f"{tensor} of a neighbour changed"
            else:
                assert torch.equal(value, stormy[tensor]), f"{tensor} of a neighbour changed"
        if not resizes:
            assert runs[0].outcomes[at].curve == runs[1].outcomes[at].curve


def check_any_slot_saves_and_loads(name: str | Recipe) -> None:
    """The file of a pack's last slot gives its outputs alone, and in the place of another slot."""
    for kind in main_kinds(name, "Conv1D"):  # whose toy has like-named layers
        _check_saved_slot(name, kind)


def _check_saved_slot(name: str | Recipe, kind: str) -> None:
    trials = [
        toy_trial(name, steps=6, seed=k, lr=lr, alpha=alpha)
        for k, (lr, alpha) in enumerate([(3e-3, 4.0), (1e-3, 4.0), (1e-2, 6.0)])
    ]
    pack = moved(train(trials, kind=kind).pack)
    pack.model.eval()
    wanted, receiver = _outputs(pack), copy.deepcopy(pack)
    pack.keep([2])
    fresh = ToyModel(kind=kind).eval()
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(fresh, Adapter(pack, name if isinstance(name, str) else "").save(folder))
    torch.testing.assert_close(fresh(inputs()), wanted[2], rtol=1e-5, atol=1e-6)
    _put(loaded.pack, receiver, 1)
    found = _outputs(receiver)
    torch.testing.assert_close(found[1], wanted[2], rtol=1e-5, atol=1e-6)
    for at in (0, 2):
        assert torch.equal(found[at], wanted[at]), f"loading into slot 1 changed slot {at}"


@torch.no_grad()
def _outputs(pack: Pack) -> Tensor:
    """Return what every slot makes of the same inputs, [K, rows, tokens, classes]."""
    out = pack.model(inputs().repeat(pack.size, 1, 1))
    return out.unflatten(0, (pack.size, -1))


@torch.no_grad()
def _put(one: Pack, into: Pack, slot: int) -> None:
    """Write all that a pack of one holds into a slot of another pack."""
    for site, other in zip(one.sites, into.sites, strict=True):
        for lo, bank in zip(other.first, other.banks, strict=True):
            if lo <= slot < lo + bank.size:
                (own,) = site.banks
                for n, value in [*own.named_parameters(), *own.named_buffers()]:
                    getattr(bank, n)[slot - lo] = value[0]
