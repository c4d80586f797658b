"""What an adapter holds: told and measured, in numbers and in bytes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from loralab import cost
from loralab.core.adapter import Adapter, adapt
from loralab.core.bank import mergeable
from loralab.core.quantized import quantize
from loralab.errors import UserError
from loralab.methods import build
from loralab.recipe import Recipe
from loralab.seeds import generator
from loralab.testing.toy import RANK
from loralab.training.optimizer import PackOptimizer

SIDE = 128
# Ranks that grow at the first step and row norms that are computed once are not in `cost.memory`.
MEMORY_TOLERANCE = 0.015


class Alive(TorchDispatchMode):
    """Remembers every storage that is made inside, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note its outputs."""
        out = func(*args, **(kwargs or {}))
        for t in tree_flatten(out)[0]:
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self._made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def sizes(self) -> dict[int, int]:
        """Return the bytes of every storage that still lives, by its address."""
        return {at: n for at, (ref, n) in self._made.items() if not ref.expired()}


def _places(tensors: list[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


def check_keeps_nothing_large(name: str | Recipe) -> None:
    """After a forward pass nothing of W's size lives, on bf16 and NF4 bases either.

    Forms that declare `dense` are free to. Asked of the storages themselves, this also finds what
    the pass keeps past autograd.
    """
    recipe = name if isinstance(name, Recipe) else build(name)
    if recipe.form.dense:
        return
    for kind in ("bf16", "nf4"):
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        model = nn.Sequential(nn.Linear(SIDE, SIDE)).to(dtype)
        if kind == "nf4":
            quantize(model, "nf4", ("0",))
        batch = torch.ones(2, SIDE, dtype=dtype)
        loss = lambda m, b: m(b).float().square().mean()  # noqa: E731
        adapter = adapt(model, recipe, rank=RANK, data=[batch], loss=loss)
        with torch.no_grad():
            model(batch)  # what is computed once for all is no part of a step
        own = _places([*model.parameters(), *model.buffers(), *_held(adapter)])
        with Alive() as alive:
            y = model(torch.ones(3, SIDE, dtype=dtype))
        kept = [n for at, n in alive.sizes().items() if at not in own]
        assert y.requires_grad, "nothing is trained"
        limit = SIDE * SIDE * dtype.itemsize
        assert max(kept) < limit, f"{max(kept)} bytes live after a forward pass on a {kind} base"


def _held(adapter: Adapter) -> list[Tensor]:
    return [*adapter.pack.parameters(), *adapter.pack.buffers()]


def check_cost_is_measured(name: str | Recipe) -> None:
    """What `loralab show` tells of numbers, bytes and merging is what an adapter has and does."""
    recipe = name if isinstance(name, Recipe) else build(name)
    told = cost.measure(recipe)
    model, pack = cost._sample(recipe)
    held = {**dict(pack.named_parameters()), **dict(pack.named_buffers())}
    _check_bytes(model, list(held.values()))
    sizes = {n: t.numel() for n, t in held.items() if t.dim() > 1}
    optimizer = PackOptimizer(pack, n_steps=300)  # so that no Schedule renews tensors in these few
    x = torch.randn(4, cost.D_IN, generator=generator("cost", "x"))
    learning: set[str] = set()
    for step in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        learning |= {n for n, p in pack.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.collect()
        optimizer.step(torch.full((1,), 1e-2), torch.zeros(1), step)
    trained, total = sum(sizes[n] for n in learning), sum(sizes.values())
    assert told.n_trained == trained, f"show tells {told.n_trained} trained numbers, not {trained}"
    assert told.n_frozen == total - trained, f"show tells {told.n_frozen} frozen of {total}"
    adapter = Adapter(pack, "")
    try:
        adapter.merge()
        merges = True
    except UserError:
        merges = False
    assert merges == mergeable(recipe.form), "show tells otherwise about merging"


def _check_bytes(model: nn.Module, held: list[Tensor]) -> None:
    """What autograd is seen to keep, which `cost.memory` adds up, is all that lives."""
    x = torch.randn(1, 128, cost.D_IN, generator=generator("cost", "tokens"))
    own = _places([*model.parameters(), *held, x])
    with torch.no_grad():
        model(x)
    saved: set[int] = set()

    def keep(t: Tensor) -> Tensor:
        saved.add(t.untyped_storage().data_ptr())
        return t

    with saved_tensors_hooks(keep, lambda t: t), Alive() as alive:
        y = model(x)
    unseen = [n for at, n in alive.sizes().items() if at not in own | saved | _places([y])]
    assert sum(unseen) < 1024, f"{sum(unseen)} bytes live that autograd does not tell of"


def check_memory_is_measured(name: str | Recipe) -> None:
    """What `cost.memory` tells is what lives after a forward pass and after a step, within 1.5 %.

    It is asked of the storages, so what a piece keeps anywhere else counts too.
    """
    recipe = name if isinstance(name, Recipe) else build(name)
    told = cost.memory(recipe)
    with Alive() as alive:
        model, pack = cost._sample(recipe)
        base = _places(list(model.state_dict().values())[:1])

        def living() -> int:
            return sum(n for at, n in alive.sizes().items() if at not in base)

        own = living()
        graph = _forward(model).grad_fn  # inputs and outputs live on only where backward reads them
        kept = living()
        del graph
        pack.penalty()  # a trainer takes what routers leave of a pass
        _forward(model).square().mean().backward()
        pack.penalty()
        optimizer = PackOptimizer(pack, n_steps=100)
        optimizer.read()
        optimizer.step(torch.full((1,), 1e-3), torch.zeros(1), 0)
        found = kept + living() - own
    assert abs(told - found) <= MEMORY_TOLERANCE * found, f"{told} bytes told of {found} that live"


def _forward(model: nn.Module) -> Tensor:
    out: Tensor = model(torch.randn(1, cost.TOKENS, cost.D_IN, generator=generator("tokens")))
    return out


KEEPING: list[Callable[[str | Recipe], None]] = [
    check_keeps_nothing_large,
    check_cost_is_measured,
    check_memory_is_measured,
]
