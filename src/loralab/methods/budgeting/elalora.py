"""ElaLoRA, arXiv 2504.00254: dW = s P Λ Q, pruned in some modules and expanded in others.

S_i as in AdaLoRA (`_svd.py`), gathered after a warm-up. Every Δ steps the k least important
triplets of every module are candidates; the b(t) = round(b (1 - progress³)) least important of all
candidates are pruned, and the modules of the b(t) most important get a new triplet each. The last
phase trains the final ranks.

All but the abstract is from the authors' code. k, b and Δ are those of most of its scripts, the
lengths of the phases near their medians. New directions are random, of unit length, made orthogonal
to the module's own; a new λ is 0 here, at most 1e-13 there. Triplets that stay keep the optimizer's
moments; the authors' trainer makes the optimizer anew.

:summary: Prunes ranks in some modules and adds as many in others while training
:equation: dW = s P diag(l) Q; move b(t) ranks from the least to the most important modules
:trap: The total number of ranks is the same at every step; only its distribution changes.
:trap: A module is expanded for its least important ranks being important, not for its best.
:trap: A new rank has no history: its importance starts at 0.
:trap: The authors' code averages the unsquared norms of the orthogonality term over all matrices;
    here it is AdaLoRA's sum of squares, which is far stronger with many sites.
:title: ElaLoRA: Elastic & Learnable Low-Rank Adaptation for Efficient Model Fine-Tuning
:authors: Huandong Chang, Zicheng Ma, Mingyuan Ma, Zhenting Qi, Andrew Sabot, Hong Jiang, H. T. Kung
:source: arXiv 2504.00254, 2025: importance, pruning and expansion of the method's section
:verified: the abstract and the authors' code (a copy, Dr-rer-nat-Who/meh: elalora.py and its
    scripts); the paper's text was not to be had
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loralab.bounds import Count, Share, SomeShare
from loralab.methods import register
from loralab.methods.budgeting._moves import Moves, move, new_ranks, room
from loralab.methods.budgeting._ranks import Window, due
from loralab.methods.budgeting._svd import AXES, AdaSVD, ByImportance
from loralab.recipe import SiteState

OWN = {f"{kind}.{name}": axis for kind in ("mean", "spread") for name, axis in AXES.items()}


@dataclass(frozen=True)
class ElaLoRA(Window, ByImportance):
    """Move ranks from modules that do not need them to those that do.

    Args:
        k: the most triplets that one module can lose in one adjustment.
        b: triplets moved per adjustment at first, over all modules.
        decays: let b fall to 0 as a cubic over the adjustments; False keeps it.
        interval: fraction of the run between two adjustments; at least one step.
    """

    t_initial: Share = 0.15
    t_final: Share = 0.2
    k: Count = 2
    b: Count = 4
    decays: bool = True
    interval: SomeShare = 0.025

    def moved(self, step: int, n_steps: int) -> int:
        """Return b after 0-based `step`."""
        progress = 1 - self.left(step, n_steps)
        return round(self.b * (1 - progress**3)) if self.decays else self.b

    def before_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Drop a new triplet's first gradient of P and Q: rounding alone, which Adam magnifies."""
        for site in sites if step > self.t_initial * n_steps else ():
            is_old = site.t["Lambda"] != 0
            site.g["P"].mul_(is_old.unsqueeze(-2))
            site.g["Q"].mul_(is_old.unsqueeze(-1))

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Take in the importance; prune and expand when it is time."""
        if not self.t_initial * n_steps < step + 1 < (1 - self.t_final) * n_steps:
            return
        scores = [self.score(site) for site in sites]
        if due(step, n_steps, self.interval):
            b = self.moved(step, n_steps)
            for site, fresh in move(sites, scores, lambda own: self.choose(sites, own, b), OWN):
                self.fill(site, fresh, step)

    def choose(self, sites: Sequence[SiteState], scores: Sequence[Tensor], b: int) -> Moves:
        """Return one slot's (site, triplet) to prune and as many sites to expand."""
        candidates, full = [], set()
        for i, (site, own) in enumerate(zip(sites, scores, strict=True)):
            n = int(own.isfinite().sum())
            least = own.argsort(stable=True)[: max(0, min(self.k, n - 1))].tolist()
            candidates += [(float(own[rank]), i, rank) for rank in least]
            if room(site, own) < self.k:
                full.add(i)
        candidates.sort()
        # Half of the candidates at most: one cannot be among the least and the most important.
        b = min(b, len(candidates) // 2)
        grown = [i for _, i, _ in reversed(candidates[-b:]) if i not in full] if b else []
        return [(i, rank) for _, i, rank in candidates[: len(grown)]], grown

    def fill(self, site: SiteState, fresh: Tensor, step: int) -> None:
        """Give new triplets unit directions orthogonal to the site's own; their λ is 0."""
        for slot, new, source in new_ranks(site, fresh, "expand", step):
            for rank in new.tolist():
                for V in (site.t["P"][slot].mT, site.t["Q"][slot]):
                    v = torch.randn(V.shape[-1], generator=source, dtype=torch.float64).to(V)
                    own = torch.linalg.qr(V[V.square().sum(-1) > 0].mT).Q
                    v = v - own @ (own.mT @ v)
                    V[rank] = v / v.norm().clamp_min(1e-6)


register("elalora", "budgeting", __doc__, AdaSVD(growth=1.0), schedule=ElaLoRA())
