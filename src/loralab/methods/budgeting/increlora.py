"""IncreLoRA, arXiv 2308.12043: dW = s P Λ Q, which starts at rank 1 and grows where it matters.

Importance of a module: I = |ΔW ∘ ∂L/∂ΔW|, S = Ī Ū with AdaLoRA's running means. At every increase
the top h modules get new triplets. Advance learning: each module keeps a reserve whose P and Q are
trained ahead under a fixed λ = 1e-5; an increase sets them in use and makes a new reserve. New
parameters have their own warm-up. AdaLoRA's orthogonality penalty stays.

From the authors' code (FeiyuZhang98/IncreLoRA, loralib/increlora.py); the paper's text was not to
be had. ∂L/∂ΔW is as large as W and nobody keeps it here, so I is summed along rows and along
columns before the absolute value, which the factors' gradients give exactly:
Σ_j ΔW_ij G_ij = Σ_k P_ik (∂L/∂P)_ik.

:summary: Starts with one triplet per module and adds more where the update matters most
:equation: dW = s P diag(l) Q; the top modules by mean(I) spread(I), I = |dW o dL/d(dW)|, get new
    triplets
:trap: The rank asked for is the mean rank at the end; training starts with rank 1.
:trap: s stays alpha / r with the rank asked for; the authors' code divides by the present rank,
    which rescales the update at every increase.
:trap: The reserve's triplets are part of the update with a factor of 1e-5, and take memory.
:trap: New parameters need their own warm-up, for the rate has long left its own.
:title: IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning
:authors: Feiyu Zhang, Liangzhi Li, Junhao Chen, Zhouqiang Jiang, Bowen Wang, Yiming Qian
:source: arXiv 2308.12043, 2023: the method's section (importance, advance learning, warm-up)
:verified: authors' code (FeiyuZhang98/IncreLoRA, loralib/increlora.py); importance from sums of
    rows and columns
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.budgeting._ranks import alive, due, regrow
from loralab.methods.budgeting.adalora import AXES, AdaSVD
from loralab.recipe import Schedule, SiteState
from loralab.training.adamw import check_moments

RESERVE = 1e-5  # λ of a triplet that learns in advance


@dataclass(frozen=True)
class IncreLoRA(Schedule):
    """Grow to the rank asked for, on average over the sites.

    Args:
        add: triplets of one increase and of the reserve; None takes half the rank asked for.
        share: share of the sites that one increase picks, at least one site; 5 of 72 in the code.
        t_initial: fraction of the run before the first increase.
        interval: fraction of the run between two increases.
        warmup: fraction of the run over which a new parameter's step grows to its full size.
        beta1, beta2: decays of the running importance and uncertainty.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"P", "Lambda", "Q"})
    trained: ClassVar[frozenset[str]] = frozenset({"P", "Lambda", "Q"})
    resizes: ClassVar[bool] = True

    add: int | None = None
    share: float = 0.07
    t_initial: float = 0.025
    interval: float = 0.025
    warmup: float = 0.025
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        check_moments(self)
        if self.add is not None and self.add < 1:
            raise UserError(f"add of IncreLoRA counts triplets, so it is not {self.add}")
        for name in ("share", "t_initial", "interval", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} of IncreLoRA is a share, not {getattr(self, name)}")

    def importance(self, site: SiteState) -> Tensor:
        """Update Ī and Ū of one module [K] from its present t and g, and return I."""
        rows, columns = (site.t[n] * site.g[n] for n in ("P", "Q"))
        total = rows.sum(-1).abs().sum(-1) + columns.sum(-2).abs().sum(-1)
        now = total / 2 / (site.site.d_in * site.site.d_out) ** 0.5
        mean, spread = (site.state.setdefault(n, torch.zeros_like(now)) for n in ("mean", "spread"))
        mean.lerp_(now, 1 - self.beta1)
        spread.lerp_((now - mean).abs(), 1 - self.beta2)
        return now

    def before_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Take in the importance, hold the reserve's λ, keep what the warm-up will slow down."""
        for site in sites:
            self.importance(site)
            if "main" in site.state:
                site.g["Lambda"].mul_(site.state["main"])
                site.state |= {"old." + name: site.t[name].clone() for name in AXES}

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Slow down what is new, and grow when it is time."""
        for site in sites:
            if step == 0:
                self.begin(site, n_steps)
            elif "old.P" in site.state:
                self.slow_down(site, step, n_steps)
        if step + 1 > self.t_initial * n_steps and due(step, n_steps, self.interval):
            short = [site.state["target"] - site.state["main"].sum(-1) for site in sites]
            left = torch.stack(short).sum(0)
            if bool((left > 0).any()):
                self.increase(sites, left, step)
        for site in sites:
            reserve = site.state["alive"] * (1 - site.state["main"])
            site.t["Lambda"].lerp_(torch.full_like(reserve, RESERVE), reserve)

    def begin(self, site: SiteState, n_steps: int) -> None:
        """Make the first reserve; only now, so that step 0 is exactly the base."""
        now = alive(site, "Lambda")
        site.state["target"] = torch.full_like(now[:, 0], site.site.rank)
        site.state["main"] = now.clone()
        # When Λ's entries (at an increase) and P's and Q's (in the reserve) began to be trained.
        for name in ("born.Lambda", "born.P"):
            site.state[name] = torch.full_like(now, -n_steps)
        self.stock_up(site, torch.full_like(now[:, 0], self.n_add(site)).long(), 0)

    def n_add(self, site: SiteState) -> int:
        """Return the triplets of one increase."""
        return self.add or max(1, int(site.state["target"][0]) // 2)

    def slow_down(self, site: SiteState, step: int, n_steps: int) -> None:
        """Take back a part of the step of what is still warming up."""
        length = max(1, round(self.warmup * n_steps))
        for name, axis in AXES.items():
            born = site.state["born.Lambda" if name == "Lambda" else "born.P"]
            part = ((step - born + 1) / length).clamp(max=1.0)
            part = part if name == "Lambda" else part.unsqueeze(-2 if axis == -1 else -1)
            old = site.state.pop("old." + name)
            site.t[name].copy_(torch.where(part < 1, old.lerp(site.t[name], part), site.t[name]))

    def increase(self, sites: Sequence[SiteState], left: Tensor, step: int) -> None:
        """Let the top h modules of every slot take their reserve in use and make a new one."""
        score = torch.stack([site.state["mean"] * site.state["spread"] for site in sites], -1)
        add = self.n_add(sites[0])
        for j, site in enumerate(sites):
            full = site.state["alive"].sum(-1) + add > min(site.site.d_in, site.site.d_out)
            score[full, j] = -torch.inf
        n_top = min(max(1, round(self.share * len(sites))), -(-int(left.max()) // add))
        best, at = score.topk(n_top, -1)
        # The last of them takes what is left of the budget.
        grant = (left[:, None] - add * torch.arange(n_top, device=left.device)).clamp(0, add)
        grant = torch.zeros_like(score).scatter_(-1, at, grant * (best > -torch.inf))
        done = left <= grant.sum(-1)
        for site, n in zip(sites, grant.unbind(-1), strict=True):
            state = site.state
            reserve = state["alive"] * (1 - state["main"])
            taken = (reserve > 0) & (reserve.cumsum(-1) <= n[:, None])
            state["main"][taken] = 1
            state["born.Lambda"][taken] = step + 1
            # Slots that have their budget have no use for a reserve; the others go on with theirs.
            keep = torch.where(done[:, None], state["main"], state["alive"])
            more = torch.where(done, 0, n).long()
            if bool((keep != state["alive"]).any() or (more > 0).any()):
                self.stock_up(site, more, step + 1, keep)

    def stock_up(self, site: SiteState, n: Tensor, step: int, keep: Tensor | None = None) -> None:
        """Add n [K] triplets to the reserve; P, Q ~ N(0, 0.02²). Keep the ranks in `keep` alone."""
        fresh = regrow(site, site.state["alive"] if keep is None else keep, n, OWN)
        site.state["born.P"][fresh] = step
        for slot in range(len(n)):
            source = site.generator(slot, "reserve", step)
            for name in ("P", "Q"):
                own = site.t[name][slot]
                own = own.mT if name == "P" else own
                draw = torch.randn(
                    int(n[slot]), own.shape[-1], generator=source, dtype=torch.float64
                )
                own[fresh[slot]] = (0.02 * draw).to(own)

    def ranks(self, sites: Sequence[SiteState]) -> list[Tensor]:
        return [site.state.get("main", alive(site, "Lambda")).sum(-1).long() for site in sites]


OWN = {"main": -1, "born.Lambda": -1, "born.P": -1}

register("increlora", "budgeting", __doc__, AdaSVD(first=1), schedule=IncreLoRA())
