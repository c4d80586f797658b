"""Which rows of a batch belong to which slot."""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from loralab.errors import UserError

EXPERT = "expert"  # the name under which `given` says which expert a row inside a block is for


class Layout:
    """Shared by all adapted layers of a pack.

    Attributes:
        rows: rows per slot of the model's present input, or None for equal shares.
        seeds: trial seeds per slot, for dropout.
        step: the training step that dropout draws for; None takes torch's global stream, which
            activation checkpointing knows how to replay.
        disabled: run the bare base.
        given: what the user hands over for the rows of the present batch, by name.
        valid: the present batch's padding mask, where a Form reads it and the model got one.
        aux: the Forms' losses on their inputs in the last forward pass, by (site, first slot).
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = list(seeds)
        self.rows: list[int] | None = None
        self.step: int | None = None
        self.disabled = False
        self.given: dict[str, Tensor] = {}
        self.valid: Tensor | None = None
        self.aux: dict[tuple[str, int], Tensor] = {}
        self._last_cast: tuple[weakref.ref[Tensor], tuple[Any, ...], Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies leave out what hangs on the graph of the last forward pass."""
        return {**vars(self), "aux": {}, "_last_cast": None}

    @property
    def size(self) -> int:
        """Return the number of slots."""
        return len(self.seeds)

    def handed(self) -> dict[str, Tensor]:
        """Return what Forms may read of the batch; what the user gives comes before the mask."""
        return ({} if self.valid is None else {"valid": self.valid}) | self.given

    def rows_of(self, n: int) -> list[int]:
        """Return the rows per slot of a tensor whose first axis has length n.

        A module that folds tokens into the first axis has a whole multiple of the rows.
        """
        rows = self.rows or [1] * self.size
        total = sum(rows)
        if total == 0 and n == 0:
            return list(rows)
        if total == 0 or n % total:
            raise UserError(
                f"a batch of {n} rows cannot be shared by {self.size} slots; give each slot its "
                "rows with `with pack.rows([...])`, batch first"
            )
        return [r * (n // total) for r in rows]

    def even(self, n: int) -> bool:
        """Return whether all slots have equally many of n rows, checking that they add up."""
        return len(set(self.rows_of(n))) == 1

    def counts(self, n_rows: int, n_flat: int) -> list[int]:
        """Return flattened rows per slot for an input of n_rows x (n_flat / n_rows) vectors."""
        per_row = n_flat // max(n_rows, 1)
        return [r * per_row for r in self.rows_of(n_rows)]

    @contextlib.contextmanager
    def using(self, rows: Sequence[int]) -> Iterator[None]:
        """Set the rows per slot for the calls inside."""
        if len(rows) != self.size:
            raise UserError(f"{len(rows)} row counts for {self.size} slots; give one per slot")
        before, self.rows = self.rows, list(rows)
        try:
            yield
        finally:
            self.rows = before

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x in `dtype`, the same tensor for all layers that read the same x.

        Under autocast every layer would otherwise keep its own low-precision copy for backward.
        """
        if x.dtype == dtype or x.dtype == torch.float64:
            return x
        if torch.compiler.is_compiling():  # which makes equal casts one by itself
            return x.to(dtype)
        base = x._base if x._base is not None else x
        # What x shows of its base, and whether it has been written to since.
        view = (x.shape, x.stride(), x.storage_offset(), x._version, x.requires_grad, dtype)
        if self._last_cast is not None:
            reference, seen, kept = self._last_cast
            if reference() is base and seen == view:
                return kept
        out = x.to(dtype)
        self._last_cast = (weakref.ref(base), view, out)
        return out
