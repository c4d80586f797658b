"""AdaLoRA, arXiv 2303.10512: dW = s P Λ Q (eq. 3), γ (‖PᵀP - I‖² + ‖QQᵀ - I‖²) (eq. 4), and a
global budget of singular values that shrinks as a cubic (section 3.3).

Importance of triplet i (section 3.2): S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij), s = Ī Ū with
I = |w g|, Ī the running mean of I under β1, Ū the running mean of |I - Ī| under β2. As in the
authors' code w is the weight after the step of which g is the gradient (before it in algorithm 1).

The paper masks to the end of training; here the triplets outside the final pattern are dropped as
soon as it is fixed, so that the last half of the run computes and stores only what stays. The rest
of γ's term goes with them.

:summary: An SVD-shaped update whose singular values are pruned across layers by importance
:equation: dW = s P diag(l) Q; keep the b(t) largest s(l_i) + mean s(P_i) + mean s(Q_i)
:trap: The rank asked for is the mean rank at the end: training starts with 1.5 times it.
:trap: s = alpha / r with that rank; PEFT divides by the starting rank instead.
:trap: The orthogonality penalty belongs to training only, never to the reported loss.
:trap: Importance is sensitivity times uncertainty, not |l|; nothing is pruned before t_initial.
:title: AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning
:authors: Qingru Zhang, Minshuo Chen, Alexander Bukharin, Nikos Karampatziakis, Pengcheng He, Yu
    Cheng, Weizhu Chen, Tuo Zhao
:source: arXiv 2303.10512, 2023: eqs. 3 and 4, sections 3.2 and 3.3
:verified: authors' code (QingruZhang/AdaLoRA) for importance and budget, equality with installed
    PEFT for the form, the survey for the squared penalty
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.budgeting._ranks import alive, due, in_use, regrow
from loralab.recipe import Evidence, Form, Schedule, Site, SiteState, Tensors
from loralab.training.adamw import check_moments

AXES = {"P": -1, "Lambda": -1, "Q": -2}


@dataclass(frozen=True)
class AdaSVD(Form):
    """The update in the shape of a singular value decomposition.

    Args:
        growth: triplets at the start, as a multiple of the site's rank, which is the mean rank
            that the schedule leaves at the end.
        gamma: weight of the orthogonality penalty, in training only.
        first: triplets at the start, whatever the rank and `growth`; None leaves it to those.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"P", "Lambda", "Q"})
    rank_axis: ClassVar[Mapping[str, int]] = AXES

    growth: float = 1.5
    gamma: float = 0.1
    first: int | None = None

    def __post_init__(self) -> None:
        if not self.growth >= 1:
            raise UserError(f"growth of AdaLoRA must be at least 1, not {self.growth}")
        if self.first is not None and self.first < 1:
            raise UserError(f"first of AdaLoRA's form must be at least 1, not {self.first}")

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return P [out, b], Lambda [b] = 0 and Q [b, in], b = growth r; P, Q ~ N(0, 0.02²)."""
        b = self.first or max(site.rank, round(self.growth * site.rank))

        def normal(name: str, *shape: int) -> Tensor:
            draw = torch.randn(shape, generator=evidence.generator(name), dtype=torch.float64)
            return (draw * 0.02).to(evidence.weight)

        return {
            "P": normal("P", site.d_out, b),
            "Lambda": evidence.weight.new_zeros(b),
            "Q": normal("Q", b, site.d_in),
        }

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return t["P"], t["Lambda"].unsqueeze(-1) * t["Q"]

    def penalty(self, t: Tensors, site: Site) -> Tensor | None:
        # The paper's squared norms, summed over sites; the authors' code averages unsquared ones.
        one = torch.eye(t["Q"].shape[-2], dtype=t["Q"].dtype, device=t["Q"].device)
        P, Q = t["P"].mT @ t["P"] - one, t["Q"] @ t["Q"].mT - one
        return self.gamma * (P.square() + Q.square()).sum((-2, -1))


@dataclass(frozen=True)
class AdaBudget(Schedule):
    """Keep the most important triplets of all sites together, ever fewer of them.

    Args:
        beta1: decay of the running importance.
        beta2: decay of the running uncertainty.
        t_initial: fraction of the run before pruning starts.
        t_final: fraction of the run, at its end, with the final pattern fixed.
        interval: fraction of the run between two prunings; at least one step.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"P", "Lambda", "Q"})
    trained: ClassVar[frozenset[str]] = frozenset({"P", "Lambda", "Q"})
    resizes: ClassVar[bool] = True

    beta1: float = 0.85
    beta2: float = 0.85
    t_initial: float = 0.1
    t_final: float = 0.5
    interval: float = 0.01

    def __post_init__(self) -> None:
        check_moments(self)
        if not (self.t_initial >= 0 and self.t_final >= 0 and self.t_initial + self.t_final < 1):
            raise UserError(
                "t_initial and t_final of AdaLoRA are fractions of the run that leave room between "
                f"them, not {self.t_initial} and {self.t_final}"
            )
        if not self.interval > 0:
            raise UserError(f"interval of AdaLoRA must be positive, not {self.interval}")

    def budget(self, step: int, n_steps: int, first: int, last: int) -> int:
        """Return how many triplets stay after 0-based `step`, from `first` down to `last`."""
        t, t_i, t_f = step + 1, self.t_initial * n_steps, self.t_final * n_steps
        left = 1 - (t - t_i) / max(n_steps - t_f - t_i, 1)
        return int(last + (first - last) * min(1.0, max(0.0, left)) ** 3)

    def score(self, site: SiteState) -> Tensor:
        """Update Ī and Ū of one site from its present t and g, and return S [K, b]."""
        parts = {}
        for name, axis in (("Lambda", None), ("P", -2), ("Q", -1)):
            now = (site.t[name] * site.g[name]).abs()
            for key in ("mean.", "spread."):
                site.state.setdefault(key + name, torch.zeros_like(now))
            mean, spread = site.state["mean." + name], site.state["spread." + name]
            mean.lerp_(now, 1 - self.beta1)
            spread.lerp_((now - mean).abs(), 1 - self.beta2)
            parts[name] = mean * spread if axis is None else (mean * spread).mean(axis)
        return parts["Lambda"] + parts["P"] + parts["Q"]

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Zero the entries of Λ outside the budget; one threshold per slot over all its sites."""
        t, end = step + 1, (1 - self.t_final) * n_steps
        kept, final = [alive(site, "Lambda") for site in sites], t + 1 > end
        if t <= end:
            scores = torch.cat([self.score(site) for site in sites], -1)
            if t <= self.t_initial * n_steps or not (due(step, n_steps, self.interval) or final):
                return
            # The pruning that fixes the final pattern takes the final budget.
            last = sum(site.site.rank for site in sites)
            keep = self.budget(n_steps - 1 if final else step, n_steps, scores.shape[-1], last)
            pattern = torch.zeros_like(scores).scatter_(-1, scores.topk(keep, -1).indices, 1.0)
            for own, new in zip(kept, pattern.split([m.shape[-1] for m in kept], -1), strict=True):
                own.copy_(new)
        # Between prunings a dropped triplet is trained again and may come back, as in the paper.
        for site, own in zip(sites, kept, strict=True):
            site.t["Lambda"].mul_(own)
            if t <= end and final:
                for name in AXES:
                    del site.state["mean." + name], site.state["spread." + name]
                regrow(site, own)

    def ranks(self, sites: Sequence[SiteState]) -> list[Tensor]:
        return in_use(sites, "Lambda")


register("adalora", "budgeting", __doc__, AdaSVD(), schedule=AdaBudget())
