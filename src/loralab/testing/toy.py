"""A model and a task small enough to run every property on every method."""

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralab.core.adapter import Adapter, adapt
from loralab.core.change import rank_axes
from loralab.core.evidence import measure
from loralab.core.pack import Pack
from loralab.core.update import gives
from loralab.methods import build
from loralab.recipe import Recipe, Tensors
from loralab.seeds import generator
from loralab.study.trial import Trial
from loralab.tasks.base import Batch, Task
from loralab.testing.space import spelled
from loralab.training.loop import train_pack
from loralab.training.trained import TrainedPack

RANK = 4
N_IN, N_HIDDEN, N_CLASSES, N_TOKENS = 8, 12, 4, 3
IGNORED = -100


TARGETS = ("up", "mid", "down")


class ToyModel(nn.Module):
    """Three adaptable layers (wide, square, narrow) and a head, on [rows, tokens, 8].

    Args:
        kind: what the adaptable layers are: "Linear", "Conv1D" (transformers', which stores W
            transposed; two blocks of them, so that layers share names and blocks differ in depth),
            "Conv2d" or "Embedding"; or "Block" for Linear layers in a module of their own, as
            feed-forward layers are.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, kind: str = "Linear") -> None:
        super().__init__()
        self.kind = kind
        make = _LAYERS["Linear" if kind == "Block" else kind]
        if kind == "Conv1D":
            self.layers = nn.Sequential(_Block(make()), _Block(make()))
        elif kind == "Block":
            self.mlp = _Block(make())
        else:
            self.up, self.mid, self.down = make()
        self.head = nn.Linear(N_IN, N_CLASSES)
        with torch.no_grad():
            for name, p in self.named_parameters():
                draw = torch.rand(p.shape, generator=generator("toy", name), dtype=torch.float64)
                p.copy_((2 * draw - 1) * 0.5)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [rows, tokens, classes]."""
        x = x.to(self.head.weight.dtype)
        if self.kind == "Embedding":
            low, high = _index(x, N_IN), _index(x.flip(-1), N_HIDDEN)
            hidden = torch.tanh(self.up(low) + self.mid(high))
            return self.head(x + hidden[..., :N_IN] + hidden[..., -N_IN:] + self.down(high))
        if self.kind == "Conv2d":  # [rows, 2, tokens, 4], a kernel of 2 x 2
            y = torch.tanh(self.up(x.unflatten(-1, (2, 4)).movedim(-2, 1)))
            y = self.down(torch.tanh(self.mid(y))).mean(-1).mT
            return self.head(x + y[:, : x.shape[1]])
        if self.kind == "Conv1D":
            return self.head(x + self.layers(x))
        if self.kind == "Block":
            return self.head(x + self.mlp(x))
        return self.head(x + _chain(self, x))


class _Block(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.up, self.mid, self.down = layers

    def forward(self, x: Tensor) -> Tensor:
        return _chain(self, x)


def _chain(layers: nn.Module, x: Tensor) -> Tensor:
    up, mid, down = (layers.get_submodule(name) for name in TARGETS)
    return cast(Tensor, down(torch.tanh(mid(torch.tanh(up(x))))))


def _conv1d() -> list[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return [Conv1D(m, n) for n, m in _SIZES]


_SIZES = ((N_IN, N_HIDDEN), (N_HIDDEN, N_HIDDEN), (N_HIDDEN, N_IN))
_LAYERS: dict[str, Any] = {
    "Linear": lambda: [nn.Linear(n, m) for n, m in _SIZES],
    "Conv1D": _conv1d,
    "Conv2d": lambda: [
        nn.Conv2d(2, N_HIDDEN, 2, padding=(1, 0)),
        nn.Conv2d(N_HIDDEN, N_HIDDEN, 1),
        nn.Conv2d(N_HIDDEN, N_IN, 1),
    ],
    "Embedding": lambda: [nn.Embedding(n, m) for n, m in _SIZES],
}


def _index(x: Tensor, n: int) -> Tensor:
    """Return a number below n for every vector."""
    return (x[..., :4].float().abs().sum(-1) * 7).long() % n  # the same for a bf16 base


class ToyTask(Task):
    """Classify each token by a random teacher; some tokens are padding."""

    name, metric = "toy", "accuracy"

    def __init__(self, n_items: int = 64) -> None:
        g = generator("toy task")
        self.x = torch.randn(n_items, N_TOKENS, N_IN, generator=g)
        self.labels = (self.x @ torch.randn(N_IN, N_CLASSES, generator=g)).argmax(-1)
        self.labels[torch.rand(self.labels.shape, generator=g) < 0.2] = IGNORED

    def size(self, split: str) -> int:
        """Return the number of items; all splits are the same."""
        return len(self.x)

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        """Return inputs and labels of these items."""
        return {"x": self.x[list(indices)], "labels": self.labels[list(indices)]}

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy and the valid tokens per row."""
        logits = model(batch["x"])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        each = F.cross_entropy(
            logits.transpose(-1, -2), batch["labels"], ignore_index=IGNORED, reduction="none"
        )
        return each.sum(-1), (batch["labels"] != IGNORED).sum(-1)

    def scores(self, model: nn.Module, split: str, indices: Sequence[int], copies: int) -> Tensor:
        """Return the share of right tokens, [copies, items]."""
        with torch.no_grad():
            logits = model(self.x[list(indices)].repeat(copies, 1, 1))
        right = (logits.argmax(-1) == self.labels[list(indices)].repeat(copies, 1)).float()
        return right.mean(-1).unflatten(0, (copies, -1))


def toy_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of a batch, as `adapt(..., loss=)` takes it."""
    sums, counts = ToyTask().losses(model, batch)
    return sums.sum() / counts.sum()


def kinds(name: str | Recipe) -> list[str]:
    """Return the kinds of toy model for the method: one for every kind of layer that it adapts."""
    form = build(name).form
    return sorted(form.layers, reverse=True) + ["Block"] * gives(form, "route")


def main_kinds(name: str | Recipe, *more: str) -> list[str]:
    """Return the first of `kinds`, a block for those that route them, and any of `more`."""
    first, *others = kinds(name)
    return [first, *(kind for kind in others if kind in ("Block", *more))]


def on_every_kind(check: Callable[[Any, str], None]) -> Callable[[Any], None]:
    """Return the check of a method on every kind of toy model that it adapts."""

    def every(name: str | Recipe) -> None:
        for kind in kinds(name):
            check(name, kind)

    every.__name__, every.__doc__ = check.__name__, check.__doc__
    return every


def toy_adapter(method: str | Recipe, model: nn.Module, rank: int = RANK, **more: Any) -> Adapter:
    """Adapt a toy model, with gradients at hand for the starts that need them."""
    batch = ToyTask().batch("train", range(16))
    more = {"targets": TARGETS, **more}
    return adapt(model, method, rank=rank, data=[batch], loss=toy_loss, **more)


def toy_evidence(names: Sequence[str], kind: str) -> dict[str, dict[str, Tensor]]:
    """Return every kind of evidence about the toy model's layers."""
    needs = frozenset({"gradient", "covariance", "gradient_covariance"})
    batch = ToyTask().batch("train", range(16))
    return measure(ToyModel(kind=kind), names, needs, [batch], toy_loss)


def toy_trial(method: str | Recipe, steps: int = 20, **more: Any) -> Trial:
    """Return a short trial of the toy task."""
    more = {"lr": 3e-3, "rank": RANK, "batch_size": 4, "targets": TARGETS, **more}
    if isinstance(method, Recipe):
        method, swaps, settings = spelled(method)
        more = {"swaps": swaps, "settings": settings, **more}
    return Trial(model="toy", task="toy", method=method, steps=steps, **more)


def train(
    trials: Sequence[Trial], dtype: torch.dtype = torch.float32, kind: str = "Linear"
) -> TrainedPack:
    """Train a pack on a fresh toy model."""
    return train_pack(ToyModel(dtype, kind), ToyTask(), trials)


def trained_adapter(
    method: str | Recipe,
    dtype: torch.dtype = torch.float32,
    kind: str = "Linear",
    steps: int = 10,
) -> Adapter:
    """Train a little, so that Schedules have acted, and move every trained tensor off its start.

    The model is in evaluation mode, where no Form draws at random.
    """
    trained = train([toy_trial(method, steps)], dtype, kind)
    moved(trained.pack).model.eval()
    return Adapter(trained.pack, method if isinstance(method, str) else "")


@torch.no_grad()
def moved(pack: Pack) -> Pack:
    """Move every trained tensor off its start, each slot its own way."""
    for name, p in pack.trainable().items():
        noise = torch.randn(p.shape, generator=generator("off", name), dtype=torch.float64)
        p.add_(0.1 * noise.to(p))
    return pack


def slot_tensors(trained: TrainedPack, trial: int) -> dict[str, Tensor]:
    """Return copies of one trial's own tensors by name."""
    pack, slot = trained.pack, trained.slots[trial]
    assert slot is not None, "the trial has left its pack"
    found = {}
    for lo, bank in pack.banks():
        if lo <= slot < lo + bank.size:
            own = bank.tensors(slot - lo, slot - lo + 1)
            if bank.schedule.resizes:
                own |= _unpadded(own, rank_axes(bank.form))
            for name, value in own.items():
                found[f"{bank.site.name}.{name}"] = value.detach().clone()
    return found


def trained_bits(method: str | Recipe, kind: str = "Linear") -> dict[str, str]:
    """Return a hash of the bits of each tensor after a short run with dropout."""
    tensors = slot_tensors(train([toy_trial(method, steps=6, dropout=0.1)], kind=kind), 0)
    return {n: sha256(t.numpy().tobytes()).hexdigest() for n, t in tensors.items()}


def _unpadded(own: Tensors, axes: Mapping[str, int]) -> Tensors:
    """Return the tensors with ranks, without the zeros that only a larger neighbour needs."""
    used = {n: own[n].movedim(axis, 0).flatten(1).any(1) for n, axis in axes.items()}
    last = torch.stack(list(used.values())).any(0).nonzero().flatten().tolist()[-1:]
    n_used = last[0] + 1 if last else 0
    return {n: own[n].narrow(axis, 0, n_used) for n, axis in axes.items()}


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a fixed batch [5, tokens, 8]."""
    return torch.randn(5, N_TOKENS, N_IN, generator=generator("inputs")).to(dtype)
