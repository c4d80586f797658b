"""A method's numbers in a few hundred bytes: a change of any formula changes them."""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loralab.core.bank import gives, has_gain, kind, mergeable
from loralab.core.change import gathered, rank_axes
from loralab.methods import get
from loralab.recipe import Evidence, Form, Hyper, Recipe, Site, SiteState, Tensors
from loralab.seeds import generator

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
    """A site that counts what a Schedule asks of it and answers with a recognisable change."""

    def __init__(self, site: Site, t: Tensors, fixed: Tensors) -> None:
        self.site, self.t, self.g, self.state, self.fixed = site, t, {}, {}, fixed
        self.scale = torch.full((N_SLOTS,), 1.5, dtype=torch.float64)
        self.seeds = list(range(N_SLOTS))
        self.weight = _draw(1, D_OUT, D_IN)
        self.n_restarts, self.n_folds, self.ranks = 0, 0.0, [float(site.rank)]
        self.n_folded = torch.zeros(N_SLOTS)
        self.axes: dict[str, int] = {}

    def fold(self, share: float = 1.0) -> None:
        self.n_folds += share
        self.n_folded += self.site.rank

    def renew(self, count: int) -> None:
        self.n_restarts += count
        for tensor in self.t.values():
            tensor.mul_(0.5)

    def resize(self, index: Tensor) -> None:
        self.ranks += [index.shape[-1], index.double().sum().item()]
        for name, axis in self.axes.items():
            for owner in (self.t, self.fixed, self.g):
                if name in owner:
                    owner[name] = gathered(owner[name], index, axis)
        shapes = {n: v.shape for n, v in self.t.items()}
        for key, value in self.state.items():
            name = key.rpartition(".")[2]
            if name in self.axes and value.dim() == len(shapes.get(name, ())):
                self.state[key] = gathered(value, index, self.axes[name])
        self.site = dataclasses.replace(self.site, rank=index.shape[-1])

    def held_out_loss(self) -> Tensor:
        total = sum(t.flatten(1).square().mean(1) for t in self.t.values())
        return total if isinstance(total, Tensor) else self.scale


def fingerprint(name: str) -> dict[str, list[float]]:
    """Return the numbers of one method: scale, start, form, penalty, rule and schedule, in fp64.

    Start tensors enter by absolute value, since an SVD's signs are the LAPACK's own; their product
    enters with its sign.
    """
    recipe = get(name).recipe
    shifts = gives(recipe.form, "bias")
    site = Site("blocks.1.layer", D_IN, D_OUT, RANK, "layer", 1, 3, RANK, has_bias=shifts)
    form, scale = recipe.form, recipe.form.scale(6.0, RANK)
    W, G = _draw(1, D_OUT, D_IN), _draw(2, D_OUT, D_IN)
    evidence = Evidence(W, scale, 5, "layer", G, G.mT @ G, G @ G.mT)
    record = {"scale": [scale, form.default_alpha(RANK), recipe.form.scale(6.0, 9)]}
    own, begun = form.init(site, evidence), recipe.start.init(site, evidence)
    t = own | begun
    record |= {f"own.{n}": _digest(own[n]) for n in sorted(form.frozen & begun.keys())}
    x = _draw(3, 5, D_IN)
    extra = _extra(form, site, W)
    if recipe.form.by_sequence:
        x = x[None]
    record |= {f"start.{n}": _digest(v.abs()) for n, v in t.items()}
    at = {
        n: _draw(10 + i, *v.shape) if v.is_floating_point() else v
        for i, (n, v) in enumerate(sorted(t.items()))
    }
    added = kind(form) != "nothing"
    if added:
        record["start.update"] = _digest(form.branch(t | extra, x, site))
        record["branch"] = _digest(form.branch(at | extra, x, site))
    if added and mergeable(form):
        record["delta"] = _digest(form.delta(at | extra, site))
    if gives(form, "inner"):
        record["inner"] = _digest(form.inner(at | extra, x, site))
    if gives(form, "outer"):
        record["outer"] = _digest(form.outer(at | extra, x @ W.mT, site))
    if gives(form, "inner", "outer", "base"):
        record["base"] = _digest(form.base(at | extra, W, site))
    if shifts:
        record["bias"] = _digest(form.bias(at | extra, _draw(5, D_OUT), site))
    if gives(form, "route"):
        record["route"] = _digest(torch.cat(form.route(at | extra, x, site), -1))
    if gives(form, "aux_loss"):
        record["aux_loss"] = _digest(form.aux_loss(at | extra, x, site))
    if gives(recipe.start, "ranks"):
        sites = [dataclasses.replace(site, name=f"blocks.{i}.layer", layer=i) for i in range(3)]
        more = [
            Evidence(W * (i + 1), scale, 5, s.name, G, G.mT @ G, G @ G.mT)
            for i, s in enumerate(sites)
        ]
        chosen = recipe.start.ranks(sites, lambda s: more[s.layer])
        record["ranks"] = [float(r) for r in (chosen or {}).values()]
    if has_gain(form):
        record["gain"] = _digest(form.gain(at | extra, 1 + _draw(4, D_OUT).abs()))
    penalty = form.penalty(at | extra, site)
    if penalty is not None:
        record["penalty"] = [penalty.item()]
    return record | _walk(recipe, site, at)


def _extra(form: Form, site: Site, W: Tensor) -> Tensors:
    """Return what the core would add to the tensors in training; given tensors stay away."""
    found = {"W": W} if "W" in form.reads else {}
    if gives(form, "draw"):
        found |= form.draw(site, 5, generator(5, "draw"))
    return found


def _walk(recipe: Recipe, site: Site, at: Tensors) -> dict[str, list[float]]:
    """Take some steps of Rule and Schedule on two sites and two slots with given gradients."""
    trained = sorted(n for n in at if n not in recipe.form.frozen and recipe.rule.trains(n))
    sites = []
    for j in range(2):
        copies = {n: torch.stack([at[n] * (1 + j + k) for k in range(N_SLOTS)]) for n in trained}
        fixed = {n: torch.stack([v] * N_SLOTS) for n, v in at.items() if n not in trained}
        sites.append(_Recorded(site, copies, fixed))
        if recipe.schedule.resizes:
            sites[-1].axes = rank_axes(recipe.form)
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
        recipe.schedule.before_step(sites, step, N_STEPS)
        recipe.rule.step(sites, hyper)
        recipe.schedule.after_step(sites, step, N_STEPS)
    record = {"lr_factor": factors, "n_params": [float(sum(at[n].numel() for n in trained))]}
    record["restarts"] = [float(one.n_restarts) for one in sites]
    if any(one.n_folds != 0 for one in sites):
        record["folds"] = [one.n_folds for one in sites]
    if recipe.schedule.resizes:
        record["resized"] = [r for one in sites for r in one.ranks]
    in_use = recipe.schedule.ranks(sites)
    if in_use is not None:
        record["in use"] = [float(r) for ranks in in_use for r in ranks]
    parts = {n: [_digest(s.t[n]) for s in sites] for n in trained}
    record |= {f"after.{n}": [x for part in both for x in part] for n, both in parts.items()}
    frozen = [n for n in at if n not in trained and gives(recipe.schedule, "after_step")]
    record |= {f"after.{n}": _digest(torch.stack([s.fixed[n] for s in sites])) for n in frozen}
    return record
