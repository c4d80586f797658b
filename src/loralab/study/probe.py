"""Memory and time of a study, estimated from a few real steps on its own model and task."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from loralab.study.backend import Bench
from loralab.study.search import Planned
from loralab.tasks.base import Batch, Task

N_STEPS = 3
N_ITEMS = 16
SLOTS_AT_MOST = 32  # more hardly ever pays: the device is busy long before
SLOTS_ON_CPU = 10  # a core is busy from 8 on; packs of 30 of several methods take twice as long
MEMORY_SHARE = 0.7  # of what is free
WORKER_BYTES = 500 * 2**20  # a process that has imported torch
OPTIMIZER_BYTES = 16  # per trained number: value, gradient and two moments in fp32


class FirstItems(Task):
    """A task cut down to its first items, so that a probe does not score a whole split."""

    def __init__(self, task: Task, n: int) -> None:
        self.task, self.n = task, n
        self.name, self.metric = task.name, task.metric
        self.higher_is_better = task.higher_is_better

    def size(self, split: str) -> int:
        """Return the number of items, the training split left whole."""
        size = self.task.size(split)
        return size if split == "train" else min(self.n, size)

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        """Return the task's batch."""
        return self.task.batch(split, indices)

    def losses(self, model: Any, batch: Batch) -> Any:
        """Return the task's losses."""
        return self.task.losses(model, batch)

    def scores(self, model: Any, split: str, indices: Sequence[int], copies: int) -> Any:
        """Return the task's scores."""
        return self.task.scores(model, split, indices, copies)


@dataclass(frozen=True)
class Probe:
    """What one slot costs.

    Args:
        n_params: trained numbers per label and rank.
        row_bytes: activations kept for backward per row.
        row_seconds: forward, backward and update per row.
        start_seconds: making a slot, its starts included.
        item_seconds: scoring one item under one adapter.
        row_tokens: tokens (or items) that count in the loss, per row.
        model_bytes: the frozen base.
        slots_at_most: trials per pack beyond which the device gains nothing.
    """

    n_params: dict[tuple[str, int], int]
    row_bytes: float
    row_seconds: float
    start_seconds: float
    item_seconds: float
    row_tokens: float
    model_bytes: int
    slots_at_most: int = SLOTS_AT_MOST

    def slot_bytes(self, planned: Planned) -> int:
        """Return the memory of one slot in a running pack."""
        trial = planned.trial
        n_params = self.n_params[planned.label, trial.rank]
        return int(OPTIMIZER_BYTES * n_params + self.row_bytes * trial.batch_size)

    def max_slots(self, group: Sequence[Planned], room: int, sharing: int = 1) -> int:
        """Return how many of the largest trials of `group` fit, at least one.

        Args:
            room: bytes free on the device before any worker started.
            sharing: how many workers share the device, each with a base of its own if several.
        """
        each = MEMORY_SHARE * room / sharing
        if sharing > 1:
            each -= self.model_bytes + WORKER_BYTES
        largest = max(1, *(self.slot_bytes(planned) for planned in group))
        return max(1, min(self.slots_at_most, int(each // largest)))

    def seconds(self, planned: Planned, n_items: int) -> float:
        """Return the time of one trial in a pack, scoring of `n_items` included."""
        trial = planned.trial
        steps = trial.steps * trial.batch_size * self.row_seconds
        return self.start_seconds + steps + n_items * self.item_seconds


def representatives(planned: Sequence[Planned]) -> list[Planned]:
    """Return one trial per (label, rank): the largest batch, the smallest learning rate."""
    found: dict[tuple[str, int], Planned] = {}
    for item in sorted(planned, key=lambda p: (-p.trial.batch_size, p.trial.lr)):
        found.setdefault((item.label, item.trial.rank), item)
    return list(found.values())


def measure(bench: Bench, planned: Sequence[Planned]) -> Probe:
    """Run three steps of small packs of one trial per method and rank, and score a few items."""
    task = FirstItems(bench.task, N_ITEMS)
    known = representatives(planned)
    n_params: dict[tuple[str, int], int] = {}
    sums = dict.fromkeys(("rows", "bytes", "steps", "start", "items", "score", "tokens"), 0.0)
    for lo in range(0, len(known), 8):
        part = known[lo : lo + 8]
        _measure_pack(bench, task, part, n_params, sums)
    for item in planned:
        n_params.setdefault((item.label, item.trial.rank), 0)
    return Probe(
        n_params=n_params,
        row_bytes=sums["bytes"] / sums["rows"],
        row_seconds=sums["steps"] / sums["rows"],
        start_seconds=sums["start"] / len(known),
        item_seconds=sums["score"] / max(1, sums["items"]),
        row_tokens=sums["tokens"] / (N_STEPS * sums["rows"]),
        model_bytes=model_bytes(bench.model),
        slots_at_most=SLOTS_ON_CPU if bench.device.type == "cpu" else SLOTS_AT_MOST,
    )


def _measure_pack(
    bench: Bench,
    task: FirstItems,
    part: Sequence[Planned],
    n_params: dict[tuple[str, int], int],
    sums: dict[str, float],
) -> None:
    trials = [dataclasses.replace(p.trial, steps=N_STEPS) for p in part]
    before = _allocated(bench.device)
    times = [time.perf_counter()]
    trained = bench.backend.train_pack(
        bench.model, task, trials, progress=lambda *_: times.append(time.perf_counter())
    )
    try:
        times.append(time.perf_counter())
        trained.evaluate("validation")
        ended = time.perf_counter()
    finally:
        trained.close()
    rows = sum(trial.batch_size for trial in trials)
    # The first step pays for warming up, so a typical step is one of the later ones.
    step = min((b - a for a, b in pairwise(times[1:-1])), default=0.0)
    sums["rows"] += rows
    sums["steps"] += step
    sums["start"] += max(0.0, times[1] - times[0] - step)
    sums["score"] += ended - times[-1]
    sums["items"] += task.size("validation") * len(trials)
    peak = sum(outcome.peak_bytes for outcome in trained.outcomes)
    if before:  # the allocator's peak holds the base, and values and gradients of the adapters
        peak -= before + 8 * sum(outcome.n_params for outcome in trained.outcomes)
    sums["bytes"] += max(0, peak)
    sums["tokens"] += sum(outcome.tokens for outcome in trained.outcomes)
    for planned, outcome in zip(part, trained.outcomes, strict=True):
        n_params[planned.label, planned.trial.rank] = outcome.n_params


def _allocated(device: Any) -> int:
    """Return the bytes that torch holds on a CUDA device; 0 elsewhere, where nobody counts."""
    import torch

    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def model_bytes(model: Any) -> int:
    """Return the bytes of a model's parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
