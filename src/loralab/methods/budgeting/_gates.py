"""Gates on ranks: hard concrete ones and their learning rate, and the removal of closed ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.bounds import Positive, SomeShare
from loralab.methods.budgeting._ranks import due, regrow
from loralab.recipe import Schedule, SiteState
from loralab.training.adamw import AdamW

GAMMA, ZETA = -0.1, 1.1  # how far the hard concrete distribution reaches beyond 0 and 1; τ is 1


def hard_concrete(log_alpha: Tensor, u: Tensor | None = None) -> Tensor:
    """Return g = min(1, max(0, ŝ (ζ - γ) + γ)), ŝ = σ(log u - log(1-u) + log α), or σ(log α)."""
    noise = 0.0 if u is None else u.double().logit(1e-6).to(log_alpha.dtype)
    return ((noise + log_alpha).sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def chance_open(log_alpha: Tensor) -> Tensor:
    """Return the probability σ(log α - τ log(-γ/ζ)) that g is not 0."""
    return (log_alpha - math.log(-GAMMA / ZETA)).sigmoid()


@dataclass(frozen=True)
class GateAdamW(AdamW):
    """AdamW with a learning rate of its own for the gates, which have far to go.

    Args:
        gate_ratio: log α's learning rate as a multiple of the others'.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"log_alpha"})

    gate_ratio: Positive = 30.0

    def lr_ratio(self, name: str) -> float:
        return self.gate_ratio if name == "log_alpha" else 1.0


@dataclass(frozen=True)
class DropClosed(Schedule):
    """Base of schedules that remove the ranks whose gate is closed.

    Args:
        interval: fraction of the run between two removals; 1 removes at the end alone. Earlier
            ones save time and memory, but what is removed cannot open again.
    """

    resizes: ClassVar[bool] = True

    interval: SomeShare = 1.0

    def open(self, site: SiteState) -> Tensor:
        """Return the mask [K, b] of ranks that are open in evaluation."""
        raise NotImplementedError

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Remove the closed ranks, when it is time."""
        if due(step, n_steps, self.interval) or step + 1 >= n_steps:
            for site in sites:
                regrow(site, self.open(site))

    def ranks(self, sites: Sequence[SiteState]) -> list[Tensor]:
        return [self.open(site).sum(-1) for site in sites]
