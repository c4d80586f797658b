"""Losses per slot, and the part of the training data that two-level methods hold out."""

from collections.abc import Sequence

import torch
from torch import Tensor

from loralab.core.pack import Pack
from loralab.tasks.base import Task, to_device
from loralab.training.schedule import DataOrder

EVERY = 5  # every fifth training item is held out from methods that ask for such data


def slot_loss(sums: Tensor, counts: Tensor, rows: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Return each slot's loss [K], summed over its own tokens over their count, and the counts."""
    total = torch.stack([part.sum() for part in sums.split(list(rows))])
    n = torch.stack([part.sum() for part in counts.split(list(rows))])
    return total / n.clamp_min(1), [int(c) for c in n]


def wants(pack: Pack, slot: int) -> bool:
    """Return whether the slot's Rule or Schedule looks at held-out data."""
    recipe = pack.slots[slot].recipe
    return bool(recipe.rule.held_out or recipe.schedule.held_out)


class HeldOut:
    """Every fifth item of the training split, for the slots that want it; no step trains on it.

    The validation and test splits stay untouched: a study selects and reports on those.
    """

    def __init__(
        self, task: Task, pack: Pack, device: torch.device, batch_sizes: Sequence[int]
    ) -> None:
        self.task, self.pack, self.device = task, pack, device
        n = task.size("train")
        self.wanting = [wants(pack, k) for k in range(pack.size)]
        self.items = list(range(EVERY - 1, n, EVERY)) or [0]
        self.sizes = list(batch_sizes)
        self.orders = [DataOrder(s.seed, n, 1, self.items) for s in pack.slots]

    def kept_from_training(self, slot: int) -> Sequence[int] | None:
        """Return the items that a slot trains on, None for all."""
        if not self.wanting[slot]:
            return None
        held = set(self.items)
        rest = [i for i in range(self.task.size("train")) if i not in held]
        return rest or None

    def keep(self, slots: Sequence[int]) -> None:
        """Follow the pack: keep these slots only."""
        for name in ("wanting", "orders", "sizes"):
            setattr(self, name, [getattr(self, name)[k] for k in slots])

    def losses(self, step: int) -> Tensor:
        """Return every slot's loss [K] on its held-out batch of this step; 0 for those without."""
        return losses_on(
            self.task,
            self.pack,
            self.device,
            [
                [order.item(step * size + i) for i in range(size)] if wanting else []
                for order, size, wanting in zip(self.orders, self.sizes, self.wanting, strict=True)
            ],
        )


def losses_on(
    task: Task, pack: Pack, device: torch.device, items: Sequence[Sequence[int]]
) -> Tensor:
    """Return every slot's loss [K] on its own training items; 0 for a slot without any."""
    batch = task.batch("train", [i for slot in items for i in slot])
    rows = [len(slot) for slot in items]
    with pack.rows(rows):
        sums, counts = task.losses(pack.model, to_device(batch, device))
        return slot_loss(sums, counts, rows)[0]
