"""Properties of one adapter on one model: exactness, gradients, memory, files."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from loralab.core.adapter import Adapter, adapt, load
from loralab.core.bank import mergeable
from loralab.core.layers import bias_of, stored, weight_of
from loralab.core.starts import group_of
from loralab.core.stopgrad import stops
from loralab.errors import UserError
from loralab.methods import build
from loralab.recipe import Evidence, Recipe
from loralab.seeds import generator
from loralab.testing.toy import (
    RANK,
    ToyModel,
    ToyTask,
    inputs,
    kinds,
    on_every_kind,
    toy_adapter,
    toy_evidence,
    toy_loss,
    toy_trial,
    trained_adapter,
)
from loralab.training.loop import train_pack
from loralab.training.optimizer import PackOptimizer


def _bits(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "loralab" not in n}


def _same(before: dict[str, Tensor], after: dict[str, Tensor], what: str) -> None:
    assert before.keys() == after.keys(), f"{what}: parameters appeared or vanished"
    for name, value in before.items():
        assert torch.equal(value, after[name]), f"{what}: {name} changed"


def check_starts_at_base(name: str | Recipe) -> None:
    """At step 0 the adapted model is the base, bit for bit, unless a piece says that it is not."""
    for kind in kinds(name):
        for dtype in (torch.float32, torch.bfloat16):
            model, x = ToyModel(dtype, kind), inputs(dtype)
            before = model(x)
            toy_adapter(name, model)
            if build(name).departs:
                error = ((model(x) - before).norm() / before.norm()).item()
                seen = error > 0 or dtype == torch.bfloat16  # which may round a small step away
                # Defaults are near the base, be it only at the sizes that they were published for.
                far = error > 0.2 and isinstance(name, str) and _departure_when_wide(name) > 0.2
                assert seen and not far, f"step 0 is off the base by {error}"
            else:
                assert torch.equal(before, model(x)), f"step 0 is not the base on {kind}, {dtype}"


def _departure_when_wide(name: str) -> float:
    """Return how far step 0 of one layer of 2048 inputs and outputs is off the base, relatively."""
    g = generator("wide")
    layer = nn.Linear(2048, 2048, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(2048, 2048, generator=g) / (3 * 2048) ** 0.5)
        model, x = nn.Sequential(layer), torch.randn(4, 2048, generator=g)
        before = model(x)
        adapt(model, name, rank=RANK)
        return ((model(x) - before).norm() / before.norm()).item()


def check_dense_equals_forward(name: str | Recipe) -> None:
    """The adapted forward is W' x with the merged W', in fp64, after training."""
    for kind in kinds(name):
        adapter = trained_adapter(name, torch.float64, kind)
        model, x = adapter.model, inputs(torch.float64)
        adapted = model(x)
        with adapter.disable():
            base = model(x)
        assert not torch.allclose(adapted, base, rtol=1e-3), "training left the update at nothing"
        if not mergeable(build(name).form):
            continue
        torch.testing.assert_close(adapter.merge()(x), adapted, rtol=1e-10, atol=1e-11)


@on_every_kind
def check_merge_is_exact(name: str | Recipe, kind: str) -> None:
    """Merging and unmerging give back every bit of the base, its flags and the adapted output."""
    for dtype in (torch.float32, torch.bfloat16):
        adapter = trained_adapter(name, dtype, kind)
        model, x = adapter.model, inputs(dtype)
        weights, adapted = _bits(model), model(x)
        flags = {n: p.requires_grad for n, p in model.named_parameters()}
        if not mergeable(build(name).form):
            try:
                adapter.merge()
            except UserError:
                return
            raise AssertionError("a Form without a dense update was merged")
        for _ in range(3):
            adapter.merge()
            adapter.unmerge()
        _same(weights, _bits(model), "merge and unmerge")
        assert torch.equal(adapted, model(x)), "the adapted output changed by merge and unmerge"
        now = {n: p.requires_grad for n, p in model.named_parameters()}
        assert now == flags, "merge and unmerge changed what is trained"


@on_every_kind
def check_disable_is_exact(name: str | Recipe, kind: str) -> None:
    """Inside `disable` the model is the base to the bit; outside nothing has changed."""
    bare = ToyModel(kind=kind)(inputs())
    adapter = trained_adapter(name, kind=kind)
    model = adapter.model
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    adapted = model(inputs())
    with adapter.disable():
        assert torch.equal(model(inputs()), bare), "disable does not give the base"
    assert torch.equal(model(inputs()), adapted), "the adapter is not back after disable"
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}, "flags changed"


def _dense_loss(adapter: Adapter, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of a bare model that computes with W' built from the adapter's tensors."""
    pack = adapter.pack
    bare = ToyModel(torch.float64, cast(ToyModel, pack.model).kind)
    weights: dict[str, Tensor] = dict(bare.named_parameters())
    for name, (_, bank) in zip(pack.names, pack.banks(), strict=True):
        module = pack.model.get_submodule(name)
        W, b = weight_of(module).detach(), bias_of(module)
        weights[f"{name}.weight"] = stored(module, bank.dense(W, 0))
        if b is not None:
            weights[f"{name}.bias"] = bank.biased(W, b.detach(), 0)
    return toy_loss(lambda x: functional_call(bare, weights, (x,)), batch)  # type: ignore[arg-type]


@on_every_kind
def check_gradients(name: str | Recipe, kind: str) -> None:
    """Gradients equal those of the dense oracle, or differences where there is no dense W'."""
    adapter = trained_adapter(name, torch.float64, kind)
    batch, tensors = ToyTask().batch("train", range(8)), adapter.parameters()
    if mergeable(build(name).form):
        ours = torch.autograd.grad(toy_loss(adapter.model, batch), tensors)
        oracle = torch.autograd.grad(_dense_loss(adapter, batch), tensors)
        for at, a, b in zip(adapter.named_parameters(), ours, oracle, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12, msg=f"gradient of {at} is off")
        return
    with stops(kept=False):
        ours = torch.autograd.grad(toy_loss(adapter.model, batch), tensors)
    for at, p, g in zip(adapter.named_parameters(), tensors, ours, strict=True):
        step = 1e-6 * torch.where(g >= 0, 1.0, -1.0).to(g)
        with torch.no_grad():
            p.add_(step)
            high = toy_loss(adapter.model, batch)
            p.sub_(2 * step)
            found = (high - toy_loss(adapter.model, batch)) / 2
            p.add_(step)
        torch.testing.assert_close(found, (g * step).sum(), rtol=1e-5, atol=1e-13, msg=at)


@on_every_kind
def check_every_tensor_learns(name: str | Recipe, kind: str) -> None:
    """Every tensor said to be trained has a non-zero gradient within three steps."""
    model, task, seen = ToyModel(kind=kind), ToyTask(), set()
    pack = toy_adapter(name, model, alpha=RANK).pack  # FourierFT's 300 saturates layers so small
    optimizer = PackOptimizer(pack, n_steps=30)  # so that no Schedule acts in these three
    for step in range(3):
        optimizer.zero_grad()
        toy_loss(model, task.batch("train", range(8))).backward()
        seen |= {n for n, p in pack.trainable().items() if p.grad is not None and p.grad.any()}
        optimizer.collect()
        optimizer.step(torch.tensor([1e-2]), torch.tensor([0.0]), step)
    silent = sorted(set(pack.trainable()) - seen)
    assert not silent, f"no gradient within three steps: {', '.join(silent)}"


@on_every_kind
def check_parameter_count(name: str | Recipe, kind: str) -> None:
    """The count is that of the tensors which the Form makes and the Rule trains."""
    model = ToyModel(kind=kind)
    adapter = toy_adapter(name, model)
    recipe = build(name)
    total = 0
    shared: dict[tuple[str, str], int] = {}
    evidence = toy_evidence(adapter.pack.names, kind)
    for site_name, (_, bank) in zip(adapter.pack.names, adapter.pack.banks(), strict=True):
        weight = weight_of(model.get_submodule(site_name)).detach()
        about = Evidence(weight, 1.0, 0, site_name, **evidence[site_name])
        for n, t in recipe.form.init(bank.site, about).items():
            if n in recipe.form.frozen or not recipe.rule.trains(n):
                continue
            if n in recipe.form.shared:
                key = (n, group_of(site_name, recipe.form.shared[n]))
                shared[key] = getattr(bank, n)[0].numel()
            else:
                total += t.numel()
    total += sum(shared.values())
    assert adapter.pack.count_parameters() == [total], "count_parameters is wrong"
    assert sum(p.numel() for p in adapter.parameters()) == total, "parameters() is not the trained"
    assert all(p.requires_grad for p in adapter.parameters())


@on_every_kind
def check_leaves_no_trace(name: str | Recipe, kind: str) -> None:
    """Training never writes the base; removing the adapter gives back the very same model."""
    model = ToyModel(kind=kind)
    for p in model.head.parameters():
        p.requires_grad_(False)
    weights = _bits(model)
    shape = {n: (type(m), dict(m.__dict__)) for n, m in model.named_modules()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    trained = train_pack(model, ToyTask(), [toy_trial(name, steps=6)])
    _same(weights, _bits(model), "training")
    trained.close()
    _same(weights, _bits(model), "close")
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}, "flags changed"
    for n, m in model.named_modules():
        assert type(m) is shape[n][0], f"{n or 'the model'} is still a {type(m).__name__}"
        assert m.__dict__.keys() == shape[n][1].keys(), f"{n or 'the model'} keeps new attributes"
        assert not m._forward_hooks and not m._forward_pre_hooks, f"{n} keeps a hook"
    assert {n for n, _ in model.named_modules()} == shape.keys(), "modules were left behind"


def check_is_lean(name: str | Recipe) -> None:
    """No tensor of W's size is kept for backward, unless the Form declares `dense`."""
    if build(name).form.dense:
        return
    n = 64
    model = nn.Sequential(nn.Linear(n, n))
    loss = lambda m, b: m(b).square().mean()  # noqa: E731
    adapter = adapt(model, name, rank=RANK, data=[torch.ones(2, n)], loss=loss)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    owned |= {p.untyped_storage().data_ptr() for p in adapter.pack.parameters()}
    large: list[tuple[int, ...]] = []

    def pack_hook(t: Tensor) -> Tensor:
        if t.numel() >= n * n and t.untyped_storage().data_ptr() not in owned:
            large.append(tuple(t.shape))
        return t

    x = torch.randn(2, n)
    with saved_tensors_hooks(pack_hook, lambda t: t):
        y = model(x).square().sum()
    y.backward()  # a matrix made again in here is not kept
    assert not large, f"kept for backward: {large}; declare `dense = True` or avoid it"


def check_save_and_load(name: str | Recipe, folder: Path | None = None) -> None:
    """A saved adapter, loaded on a fresh base, gives the same logits to the bit."""
    with tempfile.TemporaryDirectory() as temporary:
        for kind in kinds(name):
            adapter = trained_adapter(name, kind=kind)
            wanted = adapter.model(inputs())
            path = adapter.save(Path(folder or temporary) / kind)
            fresh = ToyModel(kind=kind).eval()
            load(fresh, path)
            torch.testing.assert_close(fresh(inputs()), wanted, rtol=1e-6, atol=1e-6)


CHECKS: list[Callable[[str | Recipe], None]] = [
    check_starts_at_base,
    check_dense_equals_forward,
    check_merge_is_exact,
    check_disable_is_exact,
    check_gradients,
    check_every_tensor_learns,
    check_parameter_count,
    check_leaves_no_trace,
    check_is_lean,
    check_save_and_load,
]
