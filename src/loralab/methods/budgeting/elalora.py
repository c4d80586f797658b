"""ElaLoRA: dW = s P Λ Q, pruned in some modules and expanded in others.

Every Δ steps the k triplets of each module with the least S_i (AdaLoRA's) are candidates; the b(t)
= round(b (1 - progress³)) least important of all of them go, and the modules of the b(t) most
important get a new one each. k, b, Δ and the phases follow most of the authors' scripts. There a
new λ is at most 1e-13 (here 0), the optimizer is made anew (here what stays keeps its moments), and
the penalty averages unsquared norms (here it is the paper's and AdaLoRA's, far stronger).

:summary: Prunes ranks in some modules and adds as many in others while training
:equation: dW = s P diag(l) Q; move b(t) ranks from the least to the most important modules
:trap: A module is expanded for its least important ranks being important, not for its best.
:title: ElaLoRA: Elastic & Learnable Low-Rank Adaptation for Efficient Model Fine-Tuning
:authors: Huandong Chang, Zicheng Ma, Mingyuan Ma, Zhenting Qi, Andrew Sabot, Hong Jiang, H. T. Kung
:source: arXiv 2504.00254, 2025: importance, pruning and expansion of the method's section
:verified: a Korean account of the paper's method and the authors' code (a copy,
    Dr-rer-nat-Who/meh: elalora.py and its scripts); the text itself was not to be had
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from loralab.bounds import Count, Share, SomeShare
from loralab.methods import register
from loralab.methods.budgeting._moves import Moves, move, room
from loralab.methods.budgeting._ranks import due
from loralab.methods.budgeting._svd import MEANS, AdaSVD, Growing
from loralab.recipe import SiteState


@dataclass(frozen=True)
class ElaLoRA(Growing):
    """Move ranks from modules that do not need them to those that do.

    Args:
        k: the most triplets that one module can lose in one adjustment.
        b: triplets moved per adjustment at first, over all modules.
        decays: let b fall to 0 as a cubic over the adjustments; False keeps it.
        interval: fraction of the run between two adjustments.
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

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Take in the importance; prune and expand when it is time."""
        if not self.t_initial * n_steps < step + 1 < (1 - self.t_final) * n_steps:
            return
        scores = [self.score(site) for site in sites]
        if due(step, n_steps, self.interval):
            b = self.moved(step, n_steps)
            for site, fresh in move(sites, scores, lambda own: self.choose(sites, own, b), MEANS):
                self.fill(site, fresh, step)

    def choose(self, sites: Sequence[SiteState], scores: Sequence[Tensor], b: int) -> Moves:
        """Return one slot's (site, triplet) to prune and as many sites to expand."""
        candidates: list[tuple[float, int, int]] = []
        for i, own in enumerate(scores):
            n = int(own.isfinite().sum())
            least = own.argsort(stable=True)[: max(0, min(self.k, n - 1))].tolist()
            candidates += [(float(own[rank]), i, rank) for rank in least]
        candidates.sort()
        # Half of the candidates at most: one cannot be among the least and the most important.
        b = min(b, len(candidates) // 2)
        best = [i for _, i, _ in reversed(candidates[len(candidates) - b :])]
        grown = [i for i in best if room(sites[i], scores[i]) >= self.k]
        return [(i, rank) for _, i, rank in candidates[: len(grown)]], grown


register("elalora", "budgeting", __doc__, AdaSVD(growth=1.0), schedule=ElaLoRA())
