"""A reserve of triplets that learn in advance under a tiny fixed λ, and new parameters' warm-up."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loralab.bounds import Count, Share
from loralab.methods.budgeting._moves import new_ranks
from loralab.methods.budgeting._ranks import alive, regrow
from loralab.methods.budgeting._svd import AXES, ByImportance, normal
from loralab.recipe import SiteState

RESERVE = 1e-5  # λ of a triplet that learns in advance
OWN = {"main": -1, "born.Lambda": -1, "born.P": -1}


@dataclass(frozen=True)
class WithReserve(ByImportance):
    """Base of a schedule whose modules keep a reserve beside the triplets in use.

    state["main"] [K, b] is 1 for those in use; state["alive"] is 1 for the reserve too.

    Args:
        add: triplets of one increase and of the reserve; None takes half the rank asked for, as
            IncreLoRA's code does. Its paper has a single one (section 3.3).
        warmup: fraction of the run over which a new parameter's step grows to its full size.
    """

    add: Count | None = None
    warmup: Share = 0.025

    def n_add(self, site: SiteState) -> int:
        """Return the triplets of one increase."""
        return self.add or max(1, int(site.state["target"][0]) // 2)

    def grow(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Call `take` when it is time."""
        raise NotImplementedError

    def importance(self, site: SiteState) -> Tensor:
        """Take in the importance [K] of one module, from its present t and g, and return it."""
        raise NotImplementedError

    def before_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Look at the gradients, hold the reserve's λ, and keep what the warm-up will slow down."""
        for site in sites:
            self.importance(site)
            if "main" in site.state:
                site.g["Lambda"].mul_(site.state["main"])
                site.state |= {"old." + name: site.t[name].clone() for name in AXES}

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Slow down what is new, and grow."""
        for site in sites:
            if step > 0:
                self.slow_down(site, step, n_steps)
            else:  # the first reserve comes only now, so that step 0 is exactly the base
                self.begin(site, n_steps)
        self.grow(sites, step, n_steps)
        for site in sites:
            self.hold(site)

    def ranks(self, sites: Sequence[SiteState]) -> list[Tensor]:
        return [site.state.get("main", alive(site, "Lambda")).sum(-1).long() for site in sites]

    def begin(self, site: SiteState, n_steps: int) -> None:
        """Make the first reserve."""
        now = alive(site, "Lambda")
        site.state["target"] = torch.full_like(now[:, 0], site.site.rank)
        site.state["main"] = now.clone()
        # When Λ's entries (taken in use) and P's and Q's (in the reserve) began to be trained.
        for name in ("born.Lambda", "born.P"):
            site.state[name] = torch.full_like(now, -n_steps)
        self.stock_up(site, torch.full_like(now[:, 0], self.n_add(site)).long(), 0, now)

    def stock_up(self, site: SiteState, n: Tensor, step: int, keep: Tensor) -> None:
        """Add n [K] triplets to the reserve; P, Q ~ N(0, 0.02²). Keep the ranks in `keep` alone."""
        fresh = regrow(site, keep, n, OWN)
        site.state["born.P"][fresh] = step
        for slot, new, source in new_ranks(site, fresh, "reserve", step):
            for V in (site.t["P"][slot].mT, site.t["Q"][slot]):
                V[new] = normal((len(new), V.shape[-1]), source, V)

    def take(self, site: SiteState, n: Tensor, done: Tensor, step: int) -> None:
        """Take n [K] of the reserve in use and add as many, but to no slot that is `done` [K]."""
        state = site.state
        reserve = state["alive"] * (1 - state["main"])
        taken = (reserve > 0) & (reserve.cumsum(-1) <= n[:, None])
        state["main"][taken] = 1
        state["born.Lambda"][taken] = step
        # Slots that are done have no use for a reserve; the others go on with theirs.
        keep = torch.where(done[:, None], state["main"], state["alive"])
        more = torch.where(done, 0, n).long()
        if bool((keep != state["alive"]).any() or more.any()):
            self.stock_up(site, more, step, keep)

    def hold(self, site: SiteState) -> None:
        """Give the reserve its λ."""
        reserve = site.state["alive"] * (1 - site.state["main"])
        site.t["Lambda"].lerp_(torch.full_like(reserve, RESERVE), reserve)

    def slow_down(self, site: SiteState, step: int, n_steps: int) -> None:
        """Take back a part of the step of what is still warming up."""
        length = max(1, round(self.warmup * n_steps))
        for name, axis in AXES.items():
            born = site.state["born.Lambda" if name == "Lambda" else "born.P"]
            part = ((step - born + 1) / length).clamp(max=1.0)
            part = part if name == "Lambda" else part.unsqueeze(-2 if axis == -1 else -1)
            old = site.state.pop("old." + name)
            site.t[name].copy_(torch.where(part < 1, old.lerp(site.t[name], part), site.t[name]))
