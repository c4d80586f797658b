"""Adapted layers: a module keeps its identity and weight and changes class while adapted."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from loralab.core.bank import Bank
from loralab.core.layers import is_plain, weight_of, wide
from loralab.core.layout import Layout
from loralab.errors import UserError
from loralab.seeds import generator

_classes: dict[type, type] = {}


class Adapted:
    """Mixed into a layer's class: its `loralab` child decides what the layer computes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output under the slots of the pack that is attached."""
        return self.loralab(self, *args, **kwargs)  # type: ignore[attr-defined]


def attach(module: nn.Module, adapter: nn.Module, parent: nn.Module | None = None) -> None:
    """Make `module` run through `adapter`. The class changes; weights and names stay."""
    cls = type(module)
    if cls not in _classes:
        _classes[cls] = type(f"Adapted{cls.__name__}", (Adapted, cls), {"__module__": __name__})
    module.__class__ = _classes[cls]
    # A new module is in training mode; with dropout an adapted model in evaluation mode would not
    # be deterministic.
    module.add_module("loralab", adapter.train(module.training))
    if isinstance(parent, nn.TransformerEncoderLayer):
        # In evaluation mode it reads its children's weights without calling them, unless one of
        # them has a hook.
        module.register_forward_pre_hook(_must_be_called)


def _must_be_called(module: nn.Module, args: Any) -> None:
    """Change nothing."""


def detach(module: nn.Module) -> None:
    """Give the module its own class back."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _must_be_called:
            del module._forward_pre_hooks[key]
    module.__class__ = type(module).__mro__[2]
    del module._modules["loralab"]


def base_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the layer as it was before `attach`."""
    return type(module).__mro__[2].forward(module, *args, **kwargs)  # type: ignore[attr-defined]


class LinearSite(nn.Module):
    """The banks at one linear layer. Banks cover stretches of the pack's slots; others run bare."""

    def __init__(self, name: str, layout: Layout, banks: Sequence[tuple[int, Bank]]) -> None:
        super().__init__()
        self.name, self.layout = name, layout
        self.set_banks(banks)

    def set_banks(self, banks: Sequence[tuple[int, Bank]]) -> None:
        """Take (first slot, bank), in the order of slots."""
        self.first = [lo for lo, _ in banks]
        self.banks = [bank for _, bank in banks]
        self._registered = nn.ModuleList(self.banks)  # a plain list is typed, this one is seen

    def forward(self, module: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Return the layer's output, [..., out], for x [rows, ..., in], slot-major."""
        (x,) = (*args, *kwargs.values())
        if self.layout.disabled:
            return base_forward(module, x)
        if self._fusible(module, x):
            bias: Tensor | None = module.bias  # type: ignore[assignment]
            y = self.banks[0].fused(x.reshape(-1, x.shape[-1]), weight_of(module), bias)
            return y.view(*x.shape[:-1], y.shape[-1])
        y = base_forward(module, x)
        x2, y2 = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        x2 = self.layout.cast(x2, y2.dtype)
        counts = self.layout.counts(x.shape[0], len(x2))
        weight, bias = weight_of(module), getattr(module, "bias", None)
        parts: list[Tensor] = []
        row = slot = 0
        for lo, bank in zip(self.first, self.banks, strict=True):
            skipped, own = sum(counts[slot:lo]), sum(counts[lo : lo + bank.size])
            if skipped:
                parts.append(y2[row : row + skipped])
            row, slot = row + skipped, lo + bank.size
            inputs = self._dropped(x2[row : row + own], bank, lo, counts)
            out = y2[row : row + own]
            parts.append(bank(inputs, out, weight, bias, counts[lo:slot]))
            row += own
        if row < len(y2):
            parts.append(y2[row:])
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(y.shape)

    def _fusible(self, module: nn.Module, x: Tensor) -> bool:
        """Return whether one node can do base and update: a plain layer, one bank, equal rows."""
        if len(self.banks) != 1 or not is_plain(module, type(module).__mro__[2]):
            return False
        (bank,) = self.banks
        if bank.size != self.layout.size or not bank.fusible():
            return False
        if torch.is_autocast_enabled(x.device.type) or (bank.dropout and self.training):
            return False
        return self.layout.even(x.shape[0]) and x.dtype == module.weight.dtype

    def _dropped(self, x: Tensor, bank: Bank, first: int, counts: Sequence[int]) -> Tensor:
        """Apply LoRA's input dropout with one random stream per (slot, site, step)."""
        if not (bank.dropout and self.training):
            return x
        layout, keep = self.layout, 1 - bank.dropout
        if layout.step is None:
            return nn.functional.dropout(x, bank.dropout)
        masks = [
            torch.rand(
                counts[first + k],
                x.shape[-1],
                generator=generator(layout.seeds[first + k], self.name, "dropout", layout.step),
            )
            for k in range(bank.size)
        ]
        return x * ((torch.cat(masks) < keep).to(x) / keep)


class TrainedSite(nn.Module):
    """A module trained whole, one copy per slot (`modules_to_train`): heads, norms, embeddings.

    The copies are in fp32 (fp64 for an fp64 base), where small steps add up, and are cast to the
    module's own dtype for its forward pass.
    """

    def __init__(self, module: nn.Module, layout: Layout, slots: Sequence[int]) -> None:
        super().__init__()
        self.layout, self.slots = layout, list(slots)
        self.names = [n for n, _ in module.named_parameters(recurse=False)]
        for name, value in module.named_parameters(recurse=False):
            copies = torch.stack([wide(value.detach())] * len(self.slots)).clone()
            self.register_parameter(name, nn.Parameter(copies))

    @property
    def size(self) -> int:
        """Return the number of copies."""
        return len(self.slots)

    def tensors(self) -> dict[str, Tensor]:
        """Return the copies by parameter name, [K, ...]."""
        return {n: getattr(self, n) for n in self.names}

    def forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run each slot's rows through its own copy.

        Raises:
            UserError: a pack of several slots, and a module that takes more than one tensor.
        """
        layout = self.layout
        if layout.disabled:
            return base_forward(module, *args, **kwargs)
        own = {n: v.to(getattr(module, n).dtype) for n, v in self.tensors().items()}
        if layout.size == 1:
            return self._call(module, {n: v[0] for n, v in own.items()}, *args, **kwargs)
        inputs = [*args, *kwargs.values()]
        if len(inputs) != 1:
            raise UserError(
                f"a {type(module).__mro__[2].__name__} takes {len(inputs)} inputs and cannot be "
                "trained whole by several slots at once; name the layers inside it instead"
            )
        (x,) = inputs
        counts = layout.rows_of(x.shape[0])
        if len(set(counts)) == 1 and len(counts) == self.size:
            xs = x.unflatten(0, (self.size, -1))
            run = vmap(lambda t, rows: self._call(module, t, rows), randomness="different")
            return run(own, xs).flatten(0, 1)
        parts = []
        for slot, rows in enumerate(x.split(list(counts))):
            if slot in self.slots:
                t = {n: v[self.slots.index(slot)] for n, v in own.items()}
                parts.append(self._call(module, t, rows))
            else:
                parts.append(base_forward(module, rows))
        return torch.cat(parts)

    @staticmethod
    def _call(module: nn.Module, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        bare = _Bare(module)
        named = {f"module.{n}": v for n, v in tensors.items()}
        return functional_call(bare, named, args, kwargs)


class _Bare(nn.Module):
    """Calls a layer's own forward, past its adapter."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return base_forward(self.module, *args, **kwargs)
