"""A method's numbers in a few hundred bytes: a change of any formula changes them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from loralab.core.bank import has_gain, mergeable
from loralab.methods import get
from loralab.recipe import Evidence, Hyper, Recipe, Site, SiteState, Tensors

D_IN, D_OUT, RANK, N_SLOTS, N_STEPS = 8, 12, 4, 2, 12
LEAD = {"lr": (1e-2, 3e-3), "weight_decay": (0.0, 0.1)}


def _draw(seed: int, *shape: int) -> Tensor:
    """Uniform in ±1 from a generator whose stream is stable over versions."""
    return torch.tensor(np.random.default_rng(seed).random(shape) * 2 - 1)


def _digest(tensor: Tensor) -> list[float]:
    """Return two projections of a tensor and its size."""
    x = tensor.detach().double().flatten()
    w = _draw(99, 2, x.numel())
    return [*(w @ x).tolist(), x.norm().item()]


class _Recorded(SiteState):
    """A site that counts restarts and answers them with a recognisable change."""

    def __init__(self, site: Site, t: Tensors) -> None:
        self.site, self.t, self.g, self.state = site, t, {}, {}
        self.n_restarts = 0

    def restart(self, count: int) -> None:
        self.n_restarts += count
        for tensor in self.t.values():
            tensor.mul_(0.5)


def fingerprint(name: str) -> dict[str, list[float]]:
    """Return the numbers of one method: scale, start, form, penalty, rule and schedule, in fp64.

    Start tensors enter by absolute value, since an SVD's signs are the LAPACK's own; their product
    enters with its sign.
    """
    recipe = get(name).recipe
    site = Site("layer", D_IN, D_OUT, RANK)
    form, scale = recipe.form, recipe.form.scale(6.0, RANK)
    evidence = Evidence(_draw(1, D_OUT, D_IN), scale, 5, site.name, _draw(2, D_OUT, D_IN))
    record = {"scale": [scale, form.default_alpha(RANK), recipe.form.scale(6.0, 9)]}
    t = form.init(site, evidence) | recipe.start.init(site, evidence)
    x = _draw(3, 5, D_IN)
    record |= {f"start.{n}": _digest(v.abs()) for n, v in t.items()}
    record["start.update"] = _digest(form.branch(t, x, site))
    at = {n: _draw(10 + i, *v.shape) for i, (n, v) in enumerate(sorted(t.items()))}
    record["branch"] = _digest(form.branch(at, x, site))
    if mergeable(form):
        record["delta"] = _digest(form.delta(at, site))
    if has_gain(form):
        record["gain"] = _digest(form.gain(at, 1 + _draw(4, D_OUT).abs()))
    penalty = form.penalty(at, site)
    if penalty is not None:
        record["penalty"] = [penalty.item()]
    return record | _walk(recipe, site, at)


def _walk(recipe: Recipe, site: Site, at: Tensors) -> dict[str, list[float]]:
    """Take some steps of Rule and Schedule on two sites and two slots with given gradients."""
    trained = sorted(n for n in at if n not in recipe.form.frozen and recipe.rule.trains(n))
    sites = []
    for j in range(2):
        copies = {n: torch.stack([at[n] * (1 + j + k) for k in range(N_SLOTS)]) for n in trained}
        sites.append(_Recorded(site, copies))
    factors: list[Any] = []
    for step in range(N_STEPS):
        factors.append(recipe.schedule.lr_factor(step, N_STEPS))
        lr = torch.tensor(LEAD["lr"], dtype=torch.float64) * factors[-1]
        hyper = Hyper(lr, torch.tensor(LEAD["weight_decay"], dtype=torch.float64))
        for j, one in enumerate(sites):
            one.g = {
                n: _draw(1000 + 100 * step + 10 * j + i, *one.t[n].shape)
                for i, n in enumerate(trained)
            }
        recipe.rule.step(sites, hyper)
        recipe.schedule.after_step(sites, step, N_STEPS)
    record = {"lr_factor": factors, "n_params": [float(sum(at[n].numel() for n in trained))]}
    record["restarts"] = [float(one.n_restarts) for one in sites]
    record |= {f"after.{n}": _digest(torch.stack([s.t[n] for s in sites])) for n in trained}
    return record
