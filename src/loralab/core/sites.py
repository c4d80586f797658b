"""Adapted layers: a module keeps its identity and weight and changes class while adapted."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from loralab.core.bank import Bank, stretch
from loralab.core.context import Context
from loralab.core.layers import (
    Weight,
    bias_of,
    from_vectors,
    frozen_weight,
    is_plain,
    to_vectors,
    vectors,
    weight_of,
    wide,
)
from loralab.core.layout import EXPERT, Layout
from loralab.errors import UserError
from loralab.recipe import Form
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
        """Return the layer's output for x [rows, ...], slot-major."""
        (x,) = (*args, *kwargs.values())
        if self.layout.disabled:
            return base_forward(module, x)
        weight = frozen_weight(module)
        bias = bias_of(module)
        if self._fusible(module, x):
            x2 = x.reshape(-1, x.shape[-1])
            with self._contexts(weight, x, self.layout.counts(x.shape[0], len(x2))):
                y = self.banks[0].fused(x2, weight, bias)
                self._aux_losses(x2, [len(x2) // self.layout.size] * self.layout.size)
            return y.view(*x.shape[:-1], y.shape[-1])
        out = base_forward(module, x)
        y, x = to_vectors(module, out), vectors(module, x)
        x2 = x.reshape(-1, x.shape[-1]) if x.is_floating_point() else x.flatten()
        if x2.is_floating_point():
            x2 = self.layout.cast(x2, y.dtype)
        counts = self.layout.counts(x.shape[0], len(x2))
        with self._contexts(weight, x, counts):
            y = self._stitched(x2, y, weight, bias, counts)
            self._aux_losses(x2, counts)
        return from_vectors(module, y, out)

    def _stitched(
        self, x: Tensor, y: Tensor, weight: Weight, bias: Tensor | None, counts: Sequence[int]
    ) -> Tensor:
        """Return the outputs [n, out] of banks and bare slots, put together."""
        parts: list[Tensor] = []
        row = slot = 0
        for lo, bank in zip(self.first, self.banks, strict=True):
            skipped, own = sum(counts[slot:lo]), sum(counts[lo : lo + bank.size])
            if skipped:
                parts.append(y[row : row + skipped])
            row, slot = row + skipped, lo + bank.size
            rows = slice(row, row + own)
            inputs = self._dropped(stretch(x, rows), bank, lo, counts)
            parts.append(bank(inputs, stretch(y, rows), weight, bias, counts[lo:slot]))
            row += own
        if row < len(y):
            parts.append(y[row:])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @contextlib.contextmanager
    def _contexts(self, weight: Weight, x: Tensor, counts: Sequence[int]) -> Iterator[None]:
        """Give the banks what their Forms read and draw, for one call of the layer."""
        busy = [(lo, b) for lo, b in zip(self.first, self.banks, strict=True) if b.looks_around]
        for lo, bank in busy:
            bank.context = self._context(weight, x, counts, lo, bank)
        try:
            yield
        finally:
            for _, bank in busy:
                bank.context = None

    def _context(
        self, weight: Weight, x: Tensor, counts: Sequence[int], lo: int, bank: Bank
    ) -> Context:
        layout, form, slots = self.layout, bank.form, range(lo, lo + bank.size)
        tokens = sum(counts) // max(x.shape[0], 1)
        given = {
            name: list(_by_slot(value, counts, tokens, form)[lo : lo + bank.size])
            for name, value in layout.handed().items()
            # A layer that is a block by itself may stand inside another slot's block.
            if name in form.reads and (name != EXPERT or bank.site.block)
        }
        draws = []
        if self.training and bank.draws:
            for k in slots:
                stream = ("draw", layout.step) if layout.step is not None else ("draw", _fresh())
                where = "" if form.draws_alike else self.name
                source = generator(layout.seeds[k], where, *stream)
                draw = form.draw(bank.site, counts[k], source)
                draws.append({n: t.to(weight.device) for n, t in draw.items()})
        return Context(weight if "W" in form.reads else None, given, draws, tokens)

    def _aux_losses(self, x: Tensor, counts: Sequence[int]) -> None:
        """Leave the Forms' losses on their inputs with the layout, which the pack collects."""
        if not (self.training and torch.is_grad_enabled()):
            return
        for first, bank in zip(self.first, self.banks, strict=True):
            if not bank.has_aux_loss:
                continue
            own = counts[first : first + bank.size]
            row = sum(counts[:first])
            inputs = stretch(x, slice(row, row + sum(own)))
            self.layout.aux[self.name, first] = bank.aux_loss(inputs, own)

    def _fusible(self, module: nn.Module, x: Tensor) -> bool:
        """Return whether one node can do base and update: a plain layer, one bank, equal rows."""
        if len(self.banks) != 1 or not is_plain(module, type(module).__mro__[2]):
            return False
        (bank,) = self.banks
        if bank.size != self.layout.size or not (
            bank.fusible() or bank.runs_base(weight_of(module))
        ):
            return False
        if torch.is_autocast_enabled(x.device.type) or (bank.dropout and self.training):
            return False
        return self.layout.even(x.shape[0]) and x.dtype == module.weight.dtype

    def _dropped(self, x: Tensor, bank: Bank, first: int, counts: Sequence[int]) -> Tensor:
        """Apply LoRA's input dropout with one random stream per (slot, site, step)."""
        if not (bank.dropout and self.training and x.is_floating_point()):
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


def _by_slot(value: Tensor, counts: Sequence[int], tokens: int, form: Form) -> tuple[Tensor, ...]:
    """Return a given tensor [rows, ...] or [rows, tokens, ...] as one tensor per slot."""
    n_rows = sum(counts) // max(tokens, 1)
    if value.shape[0] != n_rows:
        raise UserError(
            f"a tensor given for {value.shape[0]} rows meets a batch of {n_rows}; give one row each"
        )
    per_token = value.dim() > 1 and value.shape[1] >= tokens
    if per_token:  # with a cache of past tokens only the last ones pass through the layer
        value = value[:, value.shape[1] - tokens :]
    if form.by_sequence:
        return value.split([c // max(tokens, 1) for c in counts])
    value = value.flatten(0, 1) if per_token else value.repeat_interleave(tokens, 0)
    return value.split(list(counts))


def _fresh() -> int:
    """Return a number from torch's global stream, which activation checkpointing can replay."""
    return int(torch.randint(2**31, ()))


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
