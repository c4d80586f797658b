"""IncreLoRA: dW = s P Λ Q, which starts at rank 1 and grows where it matters.

A module has S = Ī Ū with AdaLoRA's running means of I = |ΔW ∘ ∂L/∂ΔW|. Nobody keeps ∂L/∂ΔW here, so
I is summed along rows and along columns before the absolute value, which the factors' gradients
give exactly: Σ_j ΔW_ij G_ij = Σ_k P_ik (∂L/∂P)_ik. At every increase the top h modules take their
reserve in use, whose P and Q learn ahead under λ = 1e-5 (`_reserve.py`), and get a new one.

:summary: Starts with one triplet per module and adds more where the update matters most
:equation: dW = s P diag(l) Q; the top modules by mean(I) spread(I), I = |dW o dL/d(dW)|, get new
    triplets
:trap: The rank asked for is the mean rank at the end, and s = alpha / r is of it; the authors' code
    divides by the present rank, which rescales the update at every increase.
:trap: The reserve's triplets are part of the update with a factor of 1e-5, and take memory.
:trap: New parameters need their own warm-up, for the rate has long left its own.
:title: IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning
:authors: Feiyu Zhang, Liangzhi Li, Junhao Chen, Zhouqiang Jiang, Bowen Wang, Yiming Qian
:source: arXiv 2308.12043, 2023: sections 3.1 to 3.3, eqs. 3 to 8
:verified: authors' code (FeiyuZhang98/IncreLoRA, loralib/increlora.py) and a Korean account of the
    paper, section by section with its equations; importance from sums of rows and columns; the
    text itself was not to be had
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loralab.bounds import Share, SomeShare
from loralab.methods import register
from loralab.methods.budgeting._ranks import due
from loralab.methods.budgeting._reserve import WithReserve
from loralab.methods.budgeting._svd import AdaSVD
from loralab.recipe import SiteState


@dataclass(frozen=True)
class IncreLoRA(WithReserve):
    """Grow to the rank asked for, on average over the sites.

    Args:
        share: share of the sites that one increase picks, at least one site; 5 of 72 in the code.
        t_initial: fraction of the run before the first increase.
        interval: fraction of the run between two increases.
    """

    share: Share = 0.07
    t_initial: Share = 0.025
    interval: SomeShare = 0.025

    def importance(self, site: SiteState) -> Tensor:
        P, Q = (site.t[name] * site.g[name] for name in ("P", "Q"))
        total = P.sum(-1).abs().sum(-1) + Q.sum(-2).abs().sum(-1)
        now = total / 2 / (site.site.d_in * site.site.d_out) ** 0.5
        self.running(site, now)
        return now

    def grow(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Let the top h modules of every slot take their reserve in use and make a new one."""
        if step + 1 <= self.t_initial * n_steps or not due(step, n_steps, self.interval):
            return
        left = torch.stack([s.state["target"] - s.state["main"].sum(-1) for s in sites]).sum(0)
        if bool((left <= 0).all()):
            return
        add = self.n_add(sites[0])
        score = torch.stack([s.state["mean"] * s.state["spread"] for s in sites], -1)
        for j, site in enumerate(sites):
            full = site.state["alive"].sum(-1) + add > min(site.site.d_in, site.site.d_out)
            score[full, j] = -torch.inf
        best, at = score.topk(max(1, round(self.share * len(sites))), -1)
        # The last of them takes what is left of the budget.
        grant = left[:, None] - add * torch.arange(best.shape[-1], device=left.device)
        grant = grant.clamp(0, add) * (best > -torch.inf)
        grants = torch.zeros_like(score).scatter_(-1, at, grant)
        done = left <= grants.sum(-1)
        for site, n in zip(sites, grants.unbind(-1), strict=True):
            self.take(site, n, done, step + 1)


register("increlora", "budgeting", __doc__, AdaSVD(first=1), schedule=IncreLoRA())
