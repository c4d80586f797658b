"""AdaLoRA's update and importance (arXiv 2303.10512, eqs. 3 and 4, section 3.2), also for others.

dW = s P Λ Q with the penalty γ (‖PᵀP - I‖² + ‖QQᵀ - I‖²). I = |w g| of an entry w and its gradient
g, Ī the running mean of I under β1, Ū the running mean of |I - Ī| under β2, s(w) = Ī Ū; a triplet
has S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij). As in the authors' code w is the weight after
the step of which g is the gradient (before it in algorithm 1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import AtLeastOne, Count, Decay, NonNegative
from loralab.methods.budgeting._moves import new_ranks
from loralab.methods.budgeting._ranks import Window, in_use
from loralab.recipe import Evidence, Form, Schedule, Site, SiteState, Tensors

AXES = {"P": -1, "Lambda": -1, "Q": -2}
# The names and axes of Ī and Ū of each of them.
MEANS = {f"{kind}.{name}": axis for kind in ("mean", "spread") for name, axis in AXES.items()}


def normal(shape: tuple[int, ...], source: torch.Generator, like: Tensor) -> Tensor:
    """Return draws from N(0, 0.02²), with which P and Q start."""
    return (0.02 * torch.randn(shape, generator=source, dtype=torch.float64)).to(like)


def off_orthonormal(rows: Tensor) -> Tensor:
    """Return ‖R Rᵀ - I‖² of rows R [*, b, n]."""
    one = torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device)
    return (rows @ rows.mT - one).square().sum((-2, -1))


@dataclass(frozen=True)
class Triplets(Form):
    """Base of updates in the shape of a singular value decomposition.

    Args:
        gamma: γ, in training only.
    """

    owns: ClassVar[frozenset[str]] = frozenset(AXES)
    rank_axis: ClassVar[Mapping[str, int]] = AXES

    gamma: NonNegative = 0.1

    def penalty(self, t: Tensors, site: Site) -> Tensor | None:
        # The paper's squared norms, summed over sites; the authors' code averages unsquared ones.
        return self.gamma * (off_orthonormal(t["P"].mT) + off_orthonormal(t["Q"]))


@dataclass(frozen=True)
class AdaSVD(Triplets):
    """The update P Λ Q.

    Args:
        growth: triplets at the start, as a multiple of the site's rank, which is the mean rank
            that the schedule leaves at the end.
        first: triplets at the start, whatever the rank and `growth`; None leaves it to those.
    """

    growth: AtLeastOne = 1.5
    first: Count | None = None

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return P [out, b], Lambda [b] = 0 and Q [b, in], b = growth r; P, Q ~ N(0, 0.02²)."""
        b, W = self.first or max(site.rank, round(self.growth * site.rank)), evidence.weight
        return {
            "P": normal((site.d_out, b), evidence.generator("P"), W),
            "Lambda": W.new_zeros(b),
            "Q": normal((b, site.d_in), evidence.generator("Q"), W),
        }

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return t["P"], t["Lambda"].unsqueeze(-1) * t["Q"]


@dataclass(frozen=True)
class ByImportance(Schedule):
    """Base of schedules that give triplets to modules by importance.

    Args:
        beta1, beta2: decays of the running importance and uncertainty.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"P", "Lambda", "Q"})
    trained: ClassVar[frozenset[str]] = frozenset({"P", "Lambda", "Q"})
    resizes: ClassVar[bool] = True

    beta1: Decay = 0.85
    beta2: Decay = 0.85

    def running(self, site: SiteState, now: Tensor, of: str = "") -> Tensor:
        """Take I into Ī and Ū, state["mean" + of] and state["spread" + of]; return Ī Ū."""
        mean = site.state.setdefault("mean" + of, torch.zeros_like(now))
        spread = site.state.setdefault("spread" + of, torch.zeros_like(now))
        mean.lerp_(now, 1 - self.beta1)
        spread.lerp_((now - mean).abs(), 1 - self.beta2)
        return mean * spread

    def score(self, site: SiteState) -> Tensor:
        """Take in one site's present t and g; return S [K, b]."""
        I = {name: (site.t[name] * site.g[name]).abs() for name in AXES}
        s = {name: self.running(site, now, "." + name) for name, now in I.items()}
        return s["Lambda"] + s["P"].mean(-2) + s["Q"].mean(-1)

    def ranks(self, sites: Sequence[SiteState]) -> list[Tensor]:
        return in_use(sites, "Lambda")


@dataclass(frozen=True)
class Growing(Window, ByImportance):
    """Base of schedules that give modules new triplets in new directions, with λ = 0 (ElaLoRA).

    A new triplet has no history: its importance starts at 0.
    """

    def before_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Drop a new triplet's first gradient of P and Q: rounding alone, which Adam magnifies."""
        for site in sites if step > self.t_initial * n_steps else ():
            is_old = site.t["Lambda"] != 0
            site.g["P"].mul_(is_old.unsqueeze(-2))
            site.g["Q"].mul_(is_old.unsqueeze(-1))

    def fill(self, site: SiteState, fresh: Tensor, step: int) -> None:
        """Give new triplets unit directions orthogonal to the site's own; their λ is 0."""
        for slot, new, source in new_ranks(site, fresh, "expand", step):
            for rank in new.tolist():
                for V in (site.t["P"][slot].mT, site.t["Q"][slot]):
                    v = torch.randn(V.shape[-1], generator=source, dtype=torch.float64).to(V)
                    own = torch.linalg.qr(V[V.square().sum(-1) > 0].mT).Q
                    v = v - own @ (own.mT @ v)
                    V[rank] = v / v.norm().clamp_min(1e-6)
