"""What a study asks of a task: splits, batches, a loss per row and a score per item."""

import abc
from collections.abc import Sequence

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


class Task(abc.ABC):
    """A data set with a training loss and a metric. Rows of a batch never influence each other.

    A batch is a dict of tensors whose first axis is rows. Packed training concatenates the rows
    of all slots in one batch, so every method here returns one number per row.
    """

    name: str
    metric: str  # "exact match", "accuracy", "nll": what `scores` returns
    higher_is_better: bool = True

    @abc.abstractmethod
    def size(self, split: str) -> int:
        """Return the number of items of "train", "validation" or "test"."""

    @abc.abstractmethod
    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        """Return the training batch (with labels) of these items, one row each, on the CPU."""

    @abc.abstractmethod
    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (summed loss [rows], number of valid tokens or items [rows]), differentiable."""

    @abc.abstractmethod
    def scores(self, model: nn.Module, split: str, indices: Sequence[int], copies: int) -> Tensor:
        """Return the metric of each item as [copies, len(indices)], no gradient.

        The model runs on `copies` tilings of the same items, slot-major: row k * n + i is item i
        under slot k's adapter.
        """


def tile(batch: Batch, copies: int) -> Batch:
    """Return the batch repeated `copies` times along the rows, copy-major."""
    if copies == 1:
        return batch
    return {
        name: tensor.repeat(copies, *(1,) * (tensor.dim() - 1)) for name, tensor in batch.items()
    }


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on `device`."""
    return {name: tensor.to(device) for name, tensor in batch.items()}
