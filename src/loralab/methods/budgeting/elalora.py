"""ElaLoRA, arXiv 2504.00254: dW = s P Λ Q, pruned in some modules and expanded in others.

Importance of a triplet as in AdaLoRA: S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij), s from
|w ∂L/∂w| and running means. After a warm-up, every Δ steps: the k least important triplets of every
module are candidates; of all candidates the b least important are pruned, and the modules of the b
most important get a new triplet each, so that the total stays. b falls as a cubic to 0. The last
phase trains the final ranks.

The text was not to be had beyond its abstract; selection, new directions (random, made orthogonal
to the present ones) and the cubic follow a derived work's code (messiyu/qbielora). A new λ starts
at 0 here, at no more than 1e-13 there. The lengths of the phases are ours, after AdaLoRA.

:summary: Prunes ranks in some modules and adds as many in others while training
:equation: dW = s P diag(l) Q; move b(t) ranks from the least to the most important modules
:trap: The total number of ranks is the same at every step; only its distribution changes.
:trap: A module is expanded for its least important ranks being important, not for its best.
:trap: A new rank has no history: its importance starts at 0.
:title: ElaLoRA: Elastic & Learnable Low-Rank Adaptation for Efficient Model Fine-Tuning
:authors: Huandong Chang, Zicheng Ma, Mingyuan Ma, Zhenting Qi, Andrew Sabot, Hong Jiang, H. T. Kung
:source: arXiv 2504.00254, 2025: importance, pruning and expansion of the method's section
:verified: the abstract, and the code of a derived work (messiyu/qbielora); the paper's text and
    code were not to be had
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.budgeting._ranks import alive, due, in_use, regrow
from loralab.methods.budgeting.adalora import AXES, AdaBudget, AdaSVD
from loralab.recipe import Schedule, SiteState
from loralab.training.adamw import check_moments

OWN = {f"{kind}.{name}": axis for kind in ("mean", "spread") for name, axis in AXES.items()}


@dataclass(frozen=True)
class ElaLoRA(Schedule):
    """Move ranks from modules that do not need them to those that do.

    Args:
        k: the most triplets that one module can lose in one adjustment.
        b: triplets moved per adjustment at first, over all modules.
        decays: let b fall to 0 as a cubic over the adjustments; False keeps it.
        t_initial: fraction of the run before the first adjustment.
        t_final: fraction of the run, at its end, with the final ranks.
        interval: fraction of the run between two adjustments; at least one step.
        beta1, beta2: decays of the running importance and uncertainty.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"P", "Lambda", "Q"})
    trained: ClassVar[frozenset[str]] = frozenset({"P", "Lambda", "Q"})
    resizes: ClassVar[bool] = True

    k: int = 2
    b: int = 4
    decays: bool = True
    t_initial: float = 0.1
    t_final: float = 0.5
    interval: float = 0.025
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        check_moments(self)
        if self.k < 1 or self.b < 1:
            raise UserError(f"k and b of ElaLoRA count triplets, not {self.k} and {self.b}")
        if not (self.t_initial >= 0 and self.t_final >= 0 and self.t_initial + self.t_final < 1):
            raise UserError(
                "t_initial and t_final of ElaLoRA are fractions of the run that leave room between "
                f"them, not {self.t_initial} and {self.t_final}"
            )

    def moved(self, step: int, n_steps: int) -> int:
        """Return b after 0-based `step`."""
        first, last = self.t_initial * n_steps, (1 - self.t_final) * n_steps
        progress = min(1.0, max(0.0, (step + 1 - first) / max(last - first, 1)))
        return round(self.b * (1 - progress**3)) if self.decays else self.b

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Take in the importance; prune and expand when it is time."""
        if step + 1 >= (1 - self.t_final) * n_steps:
            return
        scorer, scores = AdaBudget(self.beta1, self.beta2), []
        for site in sites:
            own = alive(site, "Lambda")
            scores.append(scorer.score(site).masked_fill(own == 0, torch.inf))
        if step + 1 <= self.t_initial * n_steps or not due(step, n_steps, self.interval):
            return
        keep = [site.state["alive"].bool() for site in sites]
        n_new = torch.stack([own.sum(-1) * 0 for own in keep])
        for slot in range(n_new.shape[1]):
            pruned, grown = self.choose(sites, [s[slot] for s in scores], self.moved(step, n_steps))
            for (i, rank), j in zip(pruned, grown, strict=True):
                keep[i][slot, rank] = False
                n_new[j, slot] += 1
        for site, own, n in zip(sites, keep, n_new, strict=True):
            if bool((own.sum(-1) != site.state["alive"].sum(-1)).any() or (n > 0).any()):
                self.fill(site, regrow(site, own, n, OWN), step)

    def choose(
        self, sites: Sequence[SiteState], scores: Sequence[Tensor], b: int
    ) -> tuple[list[tuple[int, int]], list[int]]:
        """Return one slot's (site, triplet) to prune and as many sites to expand."""
        candidates: list[tuple[float, int, int]] = []
        full = set()
        for i, (site, own) in enumerate(zip(sites, scores, strict=True)):
            n = int(own.isfinite().sum())
            for rank in own.argsort(stable=True)[: max(0, min(self.k, n - 1))].tolist():
                candidates.append((float(own[rank]), i, rank))
            if n + self.k > min(site.site.d_in, site.site.d_out):
                full.add(i)
        candidates.sort()
        # Half of the candidates at most: one cannot be among the least and the most important.
        b = min(b, len(candidates) // 2)
        grown = [i for _, i, _ in reversed(candidates[-b:]) if i not in full] if b else []
        return [(i, rank) for _, i, rank in candidates[: len(grown)]], grown

    def fill(self, site: SiteState, fresh: Tensor, step: int) -> None:
        """Give new triplets unit directions orthogonal to the site's own; their λ is 0."""
        for slot in range(len(fresh)):
            source = site.generator(slot, "expand", step)
            for rank in fresh[slot].nonzero().flatten().tolist():
                for V in (site.t["P"][slot].mT, site.t["Q"][slot]):
                    v = torch.randn(V.shape[-1], generator=source, dtype=torch.float64).to(V)
                    own = torch.linalg.qr(V[V.square().sum(-1) > 0].mT).Q
                    v = v - own @ (own.mT @ v)
                    V[rank] = v / v.norm().clamp_min(1e-6)

    def ranks(self, sites: Sequence[SiteState]) -> list[Tensor]:
        return in_use(sites, "Lambda")


register("elalora", "budgeting", __doc__, AdaSVD(growth=1.0), schedule=ElaLoRA())
