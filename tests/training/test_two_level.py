"""The upper level's gradients against a step that autograd differentiates through."""

import pytest
import torch
from torch.func import functional_call

from loralab.core.pack import Pack, SlotSpec
from loralab.methods import build
from loralab.testing.toy import RANK, TARGETS, ToyModel, ToyTask
from loralab.training.held_out import losses_on
from loralab.training.optimizer import PackOptimizer
from loralab.training.two_level import gradients_of, look_at_held_out, unrolls

RATES = [6.0, 1.0, 2.0, 3.0]  # large, for the second order to be seen
TRAINED, HELD = [[0, 1, 2], [3, 4], [5], [6, 7, 8]], [[9], [10, 11], [], [12, 13]]


def pack_of(method, **options):
    """Return slots of the method, one of them in first order, and one of LoRA."""
    second, first = build(method, **options), build(method, order="first", **options)
    recipes = [second, first, build("lora"), second]
    specs = [SlotSpec(r, RANK, seed=k, targets=TARGETS) for k, r in enumerate(recipes)]
    pack = Pack(ToyModel().double(), specs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in pack.trainable().values():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return pack


def backward(pack, items):
    pack.model.zero_grad()
    for p in pack.trainable().values():
        p.grad = None
    losses_on(ToyTask(), pack, torch.device("cpu"), items).sum().backward()


def look(pack, optimizer, step=0):
    task, device = ToyTask(), torch.device("cpu")
    again = [i if yes else [] for i, yes in zip(TRAINED, unrolls(optimizer, step), strict=True)]
    look_at_held_out(
        optimizer,
        step,
        torch.tensor(RATES, dtype=torch.float64),
        gradients_of(lambda: losses_on(task, pack, device, HELD)),
        gradients_of(lambda: losses_on(task, pack, device, again)),
    )


def slot_tensors(pack, k):
    """Return (bank, all its tensors of slot k) by site."""
    return {
        name: (bank, {n: v[k - lo].detach().clone() for n, v in bank.tensors().items()})
        for name, site in zip(pack.names, pack.sites, strict=True)
        for lo, bank in zip(site.first, site.banks, strict=True)
        if lo <= k < lo + bank.size
    }


def dense_loss(slot, items):
    """The mean loss on plain weights W + s dW, without loralab's layers."""
    model, task = ToyModel().double(), ToyTask()
    weights = {
        f"{name}.weight": model.get_submodule(name).weight + bank.form.delta(t, bank.site)
        for name, (bank, t) in slot.items()
    }
    sums, counts = task.losses(
        lambda x: functional_call(model, weights, (x,)), task.batch("train", items)
    )
    return sums.sum() / counts.sum()


def through_a_step(slot, held_out, rate, trained, held):
    """Return {site: gradient of the upper tensor} of the held-out loss after one plain step."""
    lower = [(at, n) for at, (bank, t) in slot.items() for n in bank.trained if n != held_out]
    upper = [(at, held_out) for at in slot]
    for at, n in lower + upper:
        slot[at][1][n].requires_grad_()
    old = [slot[at][1][n] for at, n in lower]
    grads = torch.autograd.grad(dense_loss(slot, trained), old, create_graph=True)
    leaves = [slot[at][1][n] for at, n in upper]
    for (at, n), p, g in zip(lower, old, grads, strict=True):
        slot[at][1][n] = p - rate * g
    found = torch.autograd.grad(dense_loss(slot, held), leaves)
    return dict(zip(slot, found, strict=True))


@pytest.mark.parametrize(("method", "upper"), [("autolora", "alpha"), ("bilora", "Lambda")])
def test_it_is_the_gradient_through_a_step_of_the_lower_level(method, upper):
    pack = pack_of(method)
    optimizer = PackOptimizer(pack, n_steps=10)
    before = {n: p.detach().clone() for n, p in pack.trainable().items()}
    backward(pack, TRAINED)
    plain = {n: p.grad.clone() for n, p in pack.trainable().items()}
    look(pack, optimizer)
    for name, p in pack.trainable().items():
        assert torch.equal(p, before[name]), name
        assert torch.equal(p.grad, plain[name]) != name.endswith(upper), name
    for k, rate in ((0, RATES[0]), (1, 0.0), (3, RATES[3])):
        slot = slot_tensors(pack, k)
        wanted = through_a_step(slot, upper, rate, TRAINED[k], HELD[k])
        first = through_a_step(slot_tensors(pack, k), upper, 0.0, TRAINED[k], HELD[k])
        for name, (bank, t) in slot_tensors(pack, k).items():
            got = getattr(bank, upper).grad[(getattr(bank, upper) == t[upper]).all(-1)][0]
            torch.testing.assert_close(got, wanted[name], rtol=1e-4, atol=1e-9)
            apart = (got - first[name]).abs().max() / got.abs().max()
            assert (apart > 1e-2) == (rate > 0), name


def test_the_upper_levels_own_penalty_is_added():
    pack = pack_of("bilora", values="binary", gamma_binary=0.5)
    other = pack_of("bilora", values="binary", gamma_binary=1e-12)
    for one in (pack, other):
        backward(one, TRAINED)
        assert one.penalty() is not None  # it is added to the training loss
        look(one, PackOptimizer(one))
    for (_, bank), (_, without) in zip(pack.banks(), other.banks(), strict=True):
        if hasattr(bank, "Lambda"):
            p = bank.Lambda.detach().sigmoid()
            wanted = 0.5 * p * (1 - p) * ((1 - p) / p).log()  # of -p log p - (1 - p) log(1 - p)
            torch.testing.assert_close(bank.Lambda.grad - without.Lambda.grad, wanted)


def test_nothing_is_looked_at_after_the_search():
    pack = pack_of("autolora")
    optimizer = PackOptimizer(pack, n_steps=10)
    assert unrolls(optimizer, 4) == [True, False, False, True]
    assert not any(unrolls(optimizer, 5))
    backward(pack, TRAINED)
    plain = {n: p.grad.clone() for n, p in pack.trainable().items()}
    look(pack, optimizer, step=5)
    for name, p in pack.trainable().items():
        assert torch.equal(p.grad, plain[name]), name
