"""The one place where a piece stops a gradient.

Holding a tensor constant in the backward pass changes the Hessian that curvature measures, so the
caller can count such stops, or let the gradient through.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Stops:
    """What happened inside `with stops(...)`: `n_met` calls of `stop_gradient` so far."""

    kept: bool
    n_met: int = 0


# A plain stack, not a context variable: activation checkpointing recomputes in another thread.
_STACK: list[Stops] = []


def holds() -> bool:
    """Return whether `stop_gradient` holds its argument constant now."""
    return not _STACK or _STACK[-1].kept


def stop_gradient(x: Tensor) -> Tensor:
    """Return x held constant in the backward pass, unless `stops(kept=False)` is in force."""
    for record in _STACK:
        record.n_met += 1
    return x.detach() if holds() else x


@contextmanager
def stops(kept: bool = True) -> Iterator[Stops]:
    """Count the stops met inside; with `kept=False` the gradient flows through them."""
    record = Stops(kept)
    _STACK.append(record)
    try:
        yield record
    finally:
        _STACK.remove(record)
