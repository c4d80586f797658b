"""Another device without its hardware: what makes a tensor on the CPU and uses it there is found.

Tensors there say that they are on "meta", since autograd runs graphs of that device on any machine.
Unlike torch's own tensors of that name they have numbers, so whole training runs work.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from loralab.core.adapter import Adapter
from loralab.core.bank import mergeable
from loralab.methods import build
from loralab.recipe import Recipe
from loralab.testing.toy import ToyModel, ToyTask, inputs, main_kinds, slot_tensors, toy_trial
from loralab.training.loop import train_pack

DEVICE = "meta"
_aten = torch.ops.aten
_MOVES = (_aten._to_copy.default, _aten.copy_.default)
# The CPU's indices are welcome on any device.
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)


class Elsewhere(Tensor):
    """A tensor that is on DEVICE as far as anyone can tell; `numbers` has what is in it."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "Elsewhere":
        """Return a tensor like `numbers` that holds them."""
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=torch.device(DEVICE),
        )
        # A conjugate is lazy, and the outer tensor does not know of it.
        made.numbers = numbers.resolve_conj().resolve_neg()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the numbers."""
        return _run(func, args, kwargs or {})

    # What follows torch does without an operation, and so without the numbers.

    def tolist(self) -> Any:
        """Return the numbers."""
        return self.numbers.tolist()

    def item(self) -> Any:
        """Return the only number."""
        return self.numbers.item()

    def __bool__(self) -> bool:
        return bool(self.numbers)

    def new_tensor(self, data: Any, **options: Any) -> Tensor:  # type: ignore[override]
        """Return a tensor of these numbers, of this dtype and here unless told otherwise."""
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **options})

    def __getitem__(self, at: Any) -> Tensor:
        return super().__getitem__(_placed(at))

    def __setitem__(self, at: Any, value: Any) -> None:
        super().__setitem__(_placed(at), value)


def _placed(at: Any) -> Any:
    """Return an index without lists, of which torch would make tensors without numbers."""
    parts = at if isinstance(at, tuple) else (at,)
    return tuple(torch.tensor(p) if isinstance(p, list | range) else p for p in parts)


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operation where its tensors are; AssertionError if they are on two devices."""
    device = kwargs.get("device")
    asked = None if device is None else torch.device(device).type == DEVICE
    near, far = _tensors((args[0], args[2:]) if func in _INDEXED else (args, kwargs))
    shapes = [list(t.shape) for t in near]
    one = not (far and near) or func in _MOVES
    assert one, f"{func}: tensors {shapes} are on the CPU, others on another device"
    drawn = not asked or kwargs.get("generator") is None
    assert drawn, f"{func}: draws on another device than its generator's"
    if func in _MOVES:
        far = _tensors(args[0])[1]
    own = kwargs if device is None else {**kwargs, "device": torch.device("cpu")}
    out = func(*tree_map_only(Tensor, _numbers, args), **tree_map_only(Tensor, _numbers, own))
    if asked or (asked is None and far):
        out = tree_map_only(Tensor, Elsewhere, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


def _numbers(t: Tensor) -> Tensor:
    assert isinstance(t, Elsewhere) or not t.is_meta, "a tensor without numbers"
    return t.numbers if isinstance(t, Elsewhere) else t


def _tensors(tree: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors of the CPU, numbers aside, and those of elsewhere."""
    leaves = [t for t in tree_leaves(tree) if isinstance(t, Tensor)]
    far: list[Tensor] = [t for t in leaves if isinstance(t, Elsewhere)]
    return [t for t in leaves if t.dim() and not isinstance(t, Elsewhere)], far


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Inside, DEVICE is a device like any other, which no operation may mix with the CPU."""

    def moving(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(data: Any, *, device: Any = None, **options: Any) -> Tensor:
            return make(data, **options) if device is None else make(data, **options).to(device)

        return made

    # torch makes a DEVICE tensor of Python numbers without them, and knows no autocast there.
    with (
        mock.patch.object(torch, "tensor", moving(torch.tensor)),
        mock.patch.object(torch, "as_tensor", moving(torch.as_tensor)),
        mock.patch.object(torch, "is_autocast_enabled", lambda *_: False),
        _Operations(),
    ):
        yield


def check_other_device(name: str | Recipe) -> None:
    """Start, training and merging work on another device, a method's with the same numbers.

    They are in fp64; the tolerance is for eigenvectors and inverses that hardly are determined, and
    pieces of several methods may determine them less than that.
    """
    for kind in main_kinds(name):
        with elsewhere():
            found = _life(name, kind, DEVICE)
        wanted = _life(name, kind, "cpu") if isinstance(name, str) else {}
        for n, value in wanted.items():
            torch.testing.assert_close(found[n], value, rtol=1e-3, atol=1e-5, msg=f"{n} is off")


def _life(name: str | Recipe, kind: str, device: str) -> dict[str, Tensor]:
    """Return trained tensors and outputs, brought to the CPU."""
    trials = [toy_trial(name, steps=3, seed=k) for k in range(2)]
    trained = train_pack(ToyModel(torch.float64, kind).to(device), ToyTask(), trials)
    found = slot_tensors(trained, 1)
    trained.pack.keep([0])
    model, x = trained.pack.model.eval(), inputs(torch.float64).to(device)
    found["outputs"] = model(x)
    if mergeable(build(name).form):
        found["merged outputs"] = Adapter(trained.pack, "").merge()(x)
    return {n: t.detach().to("cpu") for n, t in found.items()}
