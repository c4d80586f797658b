"""Properties of an adapter under other precisions, bases and ways of running."""

import tempfile
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loralab.core.adapter import Adapter, load
from loralab.core.bank import mergeable
from loralab.core.coded import CodedLinear
from loralab.core.quantized import quantize
from loralab.methods import build
from loralab.recipe import NoSchedule, Recipe
from loralab.seeds import generator
from loralab.testing.toy import (
    N_CLASSES,
    N_HIDDEN,
    RANK,
    TARGETS,
    ToyModel,
    ToyTask,
    inputs,
    kinds,
    moved,
    on_every_kind,
    slot_tensors,
    toy_adapter,
    toy_loss,
    toy_trial,
    train,
)

Name = str | Recipe
# bf16 has 8 bits, so each of some ten roundings is 0.4 % off. The gradient of a router's experts
# jumps where a token changes its choice between two near equals.
LOW_OUTPUT, LOW_GRADIENT = 0.03, 0.25
QUANTIZED = ("Linear", "Conv1D")


def _recipe(name: Name) -> Recipe:
    return name if isinstance(name, Recipe) else build(name)


def _move(adapter: Adapter) -> Adapter:
    """Move every trained tensor off its start; the model is in evaluation mode afterwards."""
    moved(adapter.pack).model.eval()
    return adapter


def _result(adapter: Adapter, model: nn.Module | None = None) -> tuple[Tensor, list[Tensor]]:
    """Return the outputs and the gradients of the toy loss and the method's own."""
    model = adapter.model if model is None else model
    _, grads = _pass(adapter, model)
    with torch.no_grad():
        return model(inputs(torch.bfloat16)), grads


def _pass(adapter: Adapter, model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Return a batch's outputs, and the gradients of the toy loss and the method's own."""
    outputs: list[Tensor] = []

    def noted(x: Tensor) -> Tensor:
        outputs.append(model(x))
        return outputs[0]

    tensors = adapter.parameters()
    batch = ToyTask().batch("train", range(8))
    batch["x"] = batch["x"].bfloat16().float()  # what a bf16 base sees
    loss = toy_loss(cast(nn.Module, noted), batch)
    extra = adapter.penalty()
    loss = loss if extra is None else loss + extra
    grads = torch.autograd.grad(loss, tensors, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(tensors, grads, strict=True)]
    return outputs[0].detach(), filled


def _gap(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Return the distance of all tensors together, relative to their norm."""
    a, b = (torch.cat([t.double().flatten() for t in ts]) for ts in (found, wanted))
    assert a.isfinite().all(), "not finite"
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


def _close(
    found: tuple[Tensor, list[Tensor]],
    wanted: tuple[Tensor, list[Tensor]],
    what: str,
    output: float,
    gradient: float,
) -> None:
    for at, a, b, allowed in (
        ("output", [found[0]], [wanted[0]], output),
        ("gradient", found[1], wanted[1], gradient),
    ):
        gap = _gap(a, b)
        assert gap <= allowed, f"{what}: the {at} is off by {gap:.1e}"


def check_bfloat16(name: Name) -> None:
    """On a bf16 base: finite, trains, and near what the same base gives in fp32."""
    for kind in kinds(name):
        adapter = _move(toy_adapter(name, ToyModel(torch.bfloat16, kind), alpha=RANK))
        low = _result(adapter)
        adapter.model.float()  # the same numbers in a wider format
        _close(low, _result(adapter), f"bf16 on {kind}", LOW_OUTPUT, LOW_GRADIENT)
    steps = 4 if isinstance(_recipe(name).schedule, NoSchedule) else 12  # two steps per restart
    trials = [toy_trial(name, steps=steps, lr=lr) for lr in (1e-2, 1e-12)]
    trained = train(trials, torch.bfloat16)
    assert trained.outcomes[0].status == "done", "training in bf16 diverged"
    moved, still = slot_tensors(trained, 0), slot_tensors(trained, 1)
    assert all(t.isfinite().all() for t in moved.values()), "training in bf16 is not finite"
    assert any(not torch.equal(t, still[n]) for n, t in moved.items()), "bf16 does not train"


def check_autocast(name: Name) -> None:
    """Under autocast to bf16 the adapted model is near what it is without."""
    for kind in kinds(name):
        adapter = _move(toy_adapter(name, ToyModel(kind=kind), alpha=RANK))
        wanted = _result(adapter)
        with torch.autocast("cpu", torch.bfloat16):
            found = _result(adapter)
        _close(found, wanted, f"autocast on {kind}", LOW_OUTPUT, LOW_GRADIENT)


@on_every_kind
def check_gradient_checkpointing(name: Name, kind: str) -> None:
    """Activations computed again in backward change no gradient, random draws included."""
    adapter = _move(toy_adapter(name, ToyModel(kind=kind), dropout=0.1))
    model = adapter.model.train()
    again = _Checkpointed(model)
    for step in (None, 2):  # draws from torch's stream, and those of a trainer's step
        adapter.pack.layout.step = step
        torch.manual_seed(0)
        wanted = _result(adapter)
        torch.manual_seed(0)
        _close(_result(adapter, again), wanted, "checkpointing", 0 if step else 1e-6, 1e-6)


class _Checkpointed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, checkpoint(self.model, x, use_reentrant=False))


def check_torch_compile(name: Name, backend: str = "aot_eager", kind: str = "Linear") -> None:
    """A compiled adapted model is one graph, and gives the same outputs and gradients."""
    adapter = _move(toy_adapter(name, ToyModel(kind=kind)))
    wanted = _pass(adapter, adapter.model)
    torch._dynamo.reset()
    compiled = cast(nn.Module, torch.compile(adapter.model, backend=backend, fullgraph=True))
    _close(_pass(adapter, compiled), wanted, f"torch.compile with {backend}", 1e-5, 1e-5)


def check_quantized_bases(name: Name) -> None:
    """On NF4 and int8 bases: the dequantised base's numbers; the codes never change."""
    for kind in (k for k in QUANTIZED if k in _recipe(name).form.layers):
        for code in ("nf4", "int8"):
            _check_quantized(name, kind, code)


def _check_quantized(name: Name, kind: str, code: str) -> None:
    model, dense = (ToyModel(torch.float64, kind) for _ in range(2))
    quantize(model, code, TARGETS)
    for at, module in model.named_modules():
        if at.endswith(TARGETS):
            dense.get_submodule(at).weight.data.copy_(module.weight)  # type: ignore
    x = inputs(torch.bfloat16)
    bits, bare = _state(model), model(x)
    ours, oracle = (_move(toy_adapter(name, m)) for m in (model, dense))
    for a, b in zip(ours.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=f"a start does not see the {code} weight")
    found = _result(ours)
    _close(found, _result(oracle), f"{code} on {kind}", 1e-10, 1e-8)
    if (kind, code) == ("Linear", "nf4"):
        fresh = quantize(ToyModel(torch.float64, kind), code, TARGETS).eval()
        with tempfile.TemporaryDirectory() as folder:
            load(fresh, ours.save(folder))
        assert _gap([fresh(x)], [found[0]]) < 1e-10, "a file does not give the adapter back"
    with ours.disable():
        assert torch.equal(model(x), bare), f"disable does not give the {code} base"
    if mergeable(_recipe(name).form):
        merged = ours.merge()(x)
        assert not any(isinstance(m, CodedLinear) for m in model.modules()), "merged is not plain"
        assert _gap([merged], [found[0]]) < 1e-10, f"merging into a {code} base is not exact"
        ours.unmerge()
        assert torch.equal(model(x), found[0]), "unmerge does not restore the output"
    ours.remove()
    after = _state(model)
    assert bits.keys() == after.keys(), "tensors of the quantised base appeared or vanished"
    assert all(torch.equal(t, after[n]) for n, t in bits.items()), "the quantised base changed"


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


class TiedToy(nn.Module):
    """An embedding, a layer, and a head that is the embedding's own matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(N_HIDDEN, N_HIDDEN)
        self.mid = nn.Linear(N_HIDDEN, N_HIDDEN)
        self.head = nn.Linear(N_HIDDEN, N_HIDDEN, bias=False)
        with torch.no_grad():
            for name, p in self.named_parameters():
                draw = torch.rand(p.shape, generator=generator("tied", name), dtype=torch.float64)
                p.copy_(2 * draw - 1)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [rows, tokens, classes] of what the toy task's vectors point to."""
        index = (x[..., :4].float().abs().sum(-1) * 7).long() % N_HIDDEN
        hidden = torch.tanh(self.mid(self.embed(index)))
        return cast(Tensor, self.head(F.layer_norm(hidden, (N_HIDDEN,))))[..., :N_CLASSES]


def check_tied_embeddings(name: Name) -> None:
    """Adapting one of two layers with one weight leaves the other and the tie alone."""
    layers = _recipe(name).form.layers
    for target in ("embed", "head"):
        if ("Embedding" if target == "embed" else "Linear") in layers:
            _check_tied(name, target)


def _check_tied(name: Name, target: str) -> None:
    model = TiedToy()
    x = inputs(torch.bfloat16).float()
    weight, before, bare = model.embed.weight, model.embed.weight.clone(), model(x)
    adapter = toy_adapter(name, model, targets=(target, "mid"))
    with torch.no_grad():
        same = torch.equal(model(x), bare)
    assert same or _recipe(name).departs, f"step 0 on a tied {target} is not the base"
    adapted = _result(_move(adapter))[0]
    assert not torch.equal(adapted, bare), f"adapting a tied {target} changes nothing"
    if mergeable(_recipe(name).form):
        merged = adapter.merge()(x)
        assert _gap([merged], [adapted]) < 1e-5, f"merging a tied {target} changes the twin"
        twin = model.head if target == "embed" else model.embed
        assert twin.weight is weight, "merging wrote the twin"
        adapter.unmerge()
    assert torch.equal(model(x), adapted), "the adapted output changed by merge and unmerge"
    adapter.remove()
    assert model.head.weight is model.embed.weight is weight, "the tie is lost"
    assert torch.equal(weight, before) and weight.requires_grad, "the tied weight changed"


ROBUSTNESS: list[Callable[[Name], None]] = [
    check_bfloat16,
    check_autocast,
    check_gradient_checkpointing,
    check_quantized_bases,
    check_tied_embeddings,
]
