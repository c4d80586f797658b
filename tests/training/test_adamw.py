"""AdamW over slots: both ways of making the step are torch's own AdamW, slot by slot."""

import pytest
import torch

from loralab.recipe import Hyper, SiteState
from loralab.training import adamw

K, RATIO = 3, {"A": 1.0, "B": 16.0}
LR = torch.tensor((1e-2, 3e-3, 0.0), dtype=torch.float64)
DECAY = torch.tensor((0.1, 0.0, 0.5), dtype=torch.float64)


class TwoRates(adamw.AdamW):
    def lr_ratio(self, name):
        return RATIO[name]


def site(seed):
    g = torch.Generator().manual_seed(seed)
    s = SiteState()
    s.t = {n: torch.randn(K, 4, 5, generator=g, dtype=torch.float64) for n in RATIO}
    s.g, s.state = {}, {}
    return s


def steps(sites, restart=True):
    """Take five steps; slot 1 of the first site counts anew from the third."""
    for i in range(5):
        for j, s in enumerate(sites):
            g = torch.Generator().manual_seed(100 * i + j)
            s.g = {n: torch.randn(t.shape, generator=g).to(t) for n, t in s.t.items()}
        if restart and i == 2:
            for memory in sites[0].state.values():
                memory[1] = 0
        TwoRates().step(sites, Hyper(LR, DECAY))
    return [s.t for s in sites]


def by_torch(sites):
    found = []
    for j, s in enumerate(sites):
        t = {n: v.clone() for n, v in s.t.items()}
        for k in range(K):
            own = {n: t[n][k].clone().requires_grad_() for n in t}
            for i in range(5):
                if i in ((0, 2) if (j, k) == (0, 1) else (0,)):
                    groups = [
                        {"params": [p], "lr": RATIO[n] * float(LR[k])} for n, p in own.items()
                    ]
                    optimizer = torch.optim.AdamW(
                        groups, weight_decay=float(DECAY[k]), foreach=False
                    )
                g = torch.Generator().manual_seed(100 * i + j)
                for n, p in own.items():
                    p.grad = torch.randn(t[n].shape, generator=g).to(p)[k]
                optimizer.step()
            for n, p in own.items():
                t[n][k] = p.detach()
        found.append(t)
    return found


@pytest.mark.parametrize("size", [1, 10**6], ids=["fused", "all slots"])
def test_each_slot_takes_the_steps_of_torch(size, monkeypatch):
    made = []
    for way in ("_by_slot", "_all_slots"):
        own = getattr(adamw, way)
        monkeypatch.setattr(adamw, way, lambda *a, own=own, way=way: made.append(way) or own(*a))
    monkeypatch.setattr(adamw, "FUSED_SIZE", size)
    sites = [site(0), site(1)]
    wanted = by_torch(sites)
    torch.testing.assert_close(steps(sites), wanted, rtol=1e-12, atol=1e-14)
    assert made == ["_by_slot" if size == 1 else "_all_slots"] * 5


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.t.update(B=s.t["B"].float()),
        lambda s: s.t.update(B=s.t["B"].mT.contiguous().mT),
    ],
    ids=["two dtypes", "a turned tensor"],
)
def test_what_the_fused_kernel_cannot_take_is_stepped_too(change, monkeypatch):
    plain, changed = site(0), site(0)
    change(changed)
    wanted = steps([plain], restart=False)
    monkeypatch.setattr(adamw, "FUSED_SIZE", 1)
    monkeypatch.setattr(adamw, "_by_slot", None)
    found = {n: t.double() for n, t in steps([changed], restart=False)[0].items()}
    torch.testing.assert_close(found, dict(wanted[0]), rtol=1e-5, atol=1e-6)
