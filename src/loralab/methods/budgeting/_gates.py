"""Gates on ranks: the removal of closed ones, and hard concrete gates under a budget (SaLoRA).

The budget b is met by Lagrangian relaxation: min over θ, max over β of L + β (mean R - b)², R the
gates expected open (Mathematics 2023, 11(20), 4317, section 3.3).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import NonNegative, Positive, SomeShare
from loralab.methods.budgeting._ranks import alive, due, regrow
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


@dataclass(frozen=True)
class L0Budget(DropClosed):
    """Hold the expected number of open gates of all sites together at the budget.

    Args:
        beta: β at the start.
        beta_lr: step of β's gradient ascent.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"A", "B", "log_alpha"})

    beta: NonNegative = 1.0
    beta_lr: NonNegative = 1.0

    def before_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Add the gradient of β (mean R - b)² by log α, and let β ascend."""
        state = sites[0].state
        if "budget" not in state:
            n = sum(site.t["log_alpha"].shape[-1] for site in sites)
            one = torch.ones_like(sites[0].t["log_alpha"][:, 0])
            budget = sum(site.site.rank for site in sites) / n
            state |= {"n": n * one, "budget": budget * one, "beta": self.beta * one}
        p = [chance_open(s.t["log_alpha"]) * alive(s, "log_alpha") for s in sites]
        gap = torch.stack([one.sum(-1) for one in p]).sum(0) / state["n"] - state["budget"]
        slope = (2 * state["beta"] * gap / state["n"])[:, None]
        for site, one in zip(sites, p, strict=True):
            site.g["log_alpha"].add_(slope * one * (1 - one))
        state["beta"].add_(self.beta_lr * gap.square())

    def open(self, site: SiteState) -> Tensor:
        return (hard_concrete(site.t["log_alpha"]) > 0) & alive(site, "log_alpha").bool()
