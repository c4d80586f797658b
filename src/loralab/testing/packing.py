"""Properties of a pack: no slot sees its neighbours."""

import torch

from loralab.testing.toy import slot_tensors, toy_trial, train


def check_packed_equals_alone(name: str, tolerance: float = 1e-5) -> None:
    """Packed equals alone after 20 steps in fp32, under permutation and subset of the pack."""
    trials = [
        toy_trial(name, lr=3e-3, seed=0),
        toy_trial(name, lr=1e-3, seed=1, batch_size=6),
        toy_trial(name, lr=2e-3, seed=0, weight_decay=0.1, clip=0.1, alpha=6.0),
    ]
    alone = [slot_tensors(train([t]), 0) for t in trials]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2]):
        packed = train([trials[i] for i in order])
        for at, i in enumerate(order):
            for tensor, value in slot_tensors(packed, at).items():
                gap = (value - alone[i][tensor]).norm() / alone[i][tensor].norm().clamp_min(1e-12)
                assert gap <= tolerance, f"{tensor} of trial {i} in {order} is off by {gap:.1e}"


def check_divergence_stays_alone(name: str) -> None:
    """A slot at learning rate 1e6 is marked diverged, and no bit of its neighbours changes."""
    good = [toy_trial(name, steps=10, seed=0), toy_trial(name, steps=10, seed=2)]
    runs = [
        train([good[0], toy_trial(name, steps=10, seed=1, lr=lr), good[1]]) for lr in (1e-3, 1e6)
    ]
    assert [o.status for o in runs[0].outcomes] == ["done"] * 3
    assert [o.status for o in runs[1].outcomes] == ["done", "diverged", "done"]
    assert runs[1].outcomes[1].step <= 4, "the divergence was noticed late"
    for at in (0, 2):
        calm, stormy = slot_tensors(runs[0], at), slot_tensors(runs[1], at)
        for tensor, value in calm.items():
            assert torch.equal(value, stormy[tensor]), f"{tensor} of a neighbour changed"
        assert runs[0].outcomes[at].curve == runs[1].outcomes[at].curve
