"""AdaLoRA, arXiv 2303.10512: dW = s P Λ Q (eq. 3), γ (‖PᵀP - I‖² + ‖QQᵀ - I‖²) (eq. 4), and a
global budget of triplets, b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))³ (section
3.3), as in the authors' code: eq. 12 prints t - t_i - t_f, which would jump at both ends.

The form and the importance S_i (section 3.2) are in `_svd.py`. The paper masks to the end of
training; here the triplets outside the final pattern, and their part of γ's term, are dropped as
soon as it is fixed, so that the last half of the run computes and stores only what stays.

:summary: An SVD-shaped update whose singular values are pruned across layers by importance
:equation: dW = s P diag(l) Q; keep the b(t) largest s(l_i) + mean s(P_i) + mean s(Q_i)
:trap: The rank asked for is the mean rank at the end: training starts with 1.5 times it.
:trap: s = alpha / r with that rank; PEFT divides by the starting rank instead.
:trap: The orthogonality penalty belongs to training only, never to the reported loss.
:trap: Importance is sensitivity times uncertainty, not |l|; nothing is pruned before t_initial.
:title: AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning
:authors: Qingru Zhang, Minshuo Chen, Alexander Bukharin, Nikos Karampatziakis, Pengcheng He, Yu
    Cheng, Weizhu Chen, Tuo Zhao
:source: arXiv 2303.10512, 2023: eqs. 3, 4 and 7 to 12, sections 3.2 and 3.3
:verified: paper (sections 3 and 4, appendix A) and authors' code (QingruZhang/AdaLoRA), equality
    with installed PEFT for the form
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loralab.bounds import SomeShare
from loralab.methods import register
from loralab.methods.budgeting._ranks import Window, alive, due, regrow
from loralab.methods.budgeting._svd import AXES, AdaSVD, ByImportance
from loralab.recipe import SiteState


@dataclass(frozen=True)
class AdaBudget(Window, ByImportance):
    """Keep the most important triplets of all sites together, ever fewer of them.

    Args:
        interval: fraction of the run between two prunings; at least one step.
    """

    interval: SomeShare = 0.01

    def budget(self, step: int, n_steps: int, first: int, last: int) -> int:
        """Return how many triplets stay after 0-based `step`, from `first` down to `last`."""
        return int(last + (first - last) * self.left(step, n_steps) ** 3)

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Zero the entries of Λ outside the budget; one threshold per slot over all its sites."""
        t, end = step + 1, (1 - self.t_final) * n_steps
        if t > end:
            return
        scores = [self.score(site) for site in sites]
        is_last = t + 1 > end
        if t <= self.t_initial * n_steps or not (due(step, n_steps, self.interval) or is_last):
            return
        every = torch.cat(scores, -1)
        n_kept = sum(site.site.rank for site in sites)
        if not is_last:
            n_kept = self.budget(step, n_steps, every.shape[-1], n_kept)
        pattern = torch.zeros_like(every).scatter_(-1, every.topk(n_kept, -1).indices, 1.0)
        kept = pattern.split([score.shape[-1] for score in scores], -1)
        # Between prunings a dropped triplet is trained again and may come back, as in the paper.
        for site, own in zip(sites, kept, strict=True):
            alive(site, "Lambda").copy_(own)
            site.t["Lambda"].mul_(own)
            if is_last:
                for name in AXES:
                    del site.state["mean." + name], site.state["spread." + name]
                regrow(site, own)


register("adalora", "budgeting", __doc__, AdaSVD(), schedule=AdaBudget())
