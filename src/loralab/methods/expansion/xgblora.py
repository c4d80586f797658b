"""XGBLoRA, arXiv 2410.19694: W_t = W_{t-1} + s B_t A_t, boosters of rank 1 on few random layers.

Each booster trains the pairs of L_s randomly drawn layers for κ steps; then they join the frozen
part and the next one begins with other layers. The paper merges into W; here the sum is the
adapter's own frozen low-rank term. It adds the boosters unshrunk, α_t = 1.

:summary: Boosting: a chain of rank-1 updates, each on a few layers drawn at random
:equation: dW = s (B_1 A_1 + ... + B_T A_T), A_t, B_t of rank 1 and 0 outside L_s layers
:trap: The rank asked for has no effect unless booster_rank is None: boosters have rank 1.
:trap: A layer never drawn stays at the base; T L_s should well exceed the depth.
:trap: The layers not drawn still compute their gradients, which are then dropped.
:title: Less is More: Extreme Gradient Boost Rank-1 Adaption for Efficient Finetuning of LLMs
:authors: Yifei Zhang, Hao Zhu, Aiwei Liu, Han Yu, Piotr Koniusz, Irwin King
:source: arXiv 2410.19694, 2024: eq. 8
:verified: the abstract, public reviews of the paper and the survey arXiv 2601.22708; its text was
    not to be had, so the number of boosters is ours
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.cola import check_phases, forget, phase_ended, total_rank
from loralab.methods.expansion.lora import LoRA, plain_pair
from loralab.recipe import Evidence, Schedule, Site, SiteState, Start, Tensors
from loralab.training.adamw import per_slot


@dataclass(frozen=True)
class WeakBooster(Start):
    """LoRA's pair, at the boosters' rank.

    Args:
        booster_rank: the rank of a booster, 1 in the paper; None for the rank asked for.
    """

    keeps_scale: ClassVar[bool] = True

    booster_rank: int | None = 1

    def __post_init__(self) -> None:
        if self.booster_rank is not None and self.booster_rank < 1:
            raise UserError(f"booster_rank of XGBLoRA must be positive, not {self.booster_rank}")

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        return plain_pair(site, evidence)

    def ranks(
        self, sites: Sequence[Site], evidence: Callable[[Site], Evidence]
    ) -> dict[str, int] | None:
        if self.booster_rank is None:
            return None
        return {site.name: self.booster_rank for site in sites}


@dataclass(frozen=True)
class Boosting(Schedule):
    """Train the pairs of a few layers at a time.

    Args:
        every: κ, the optimizer steps per booster; None cuts the run into `n_boosters` equal parts.
        n_boosters: used when `every` is None; the number is ours.
        n_layers: L_s, transformer blocks per booster; 2 in the survey arXiv 2601.22708.
    """

    pair_only: ClassVar[bool] = True

    every: int | None = None
    n_boosters: int = 10
    n_layers: int = 2

    def __post_init__(self) -> None:
        check_phases(self, "n_boosters")
        if self.n_layers < 1:
            raise UserError(f"n_layers of XGBLoRA must be positive, not {self.n_layers}")

    def draw(self, sites: Sequence[SiteState], count: int) -> None:
        """Note in every site's memory which slots [K] train it in booster number `count`."""
        n = sites[0].site.n_layers
        for slot in range(len(sites[0].seeds)):
            generator = sites[0].generator(slot, "layers of booster", count)
            chosen = set(torch.randperm(n, generator=generator)[: self.n_layers].tolist())
            for site in sites:
                mask = site.state.setdefault("chosen", torch.zeros_like(site.scale))
                mask[slot] = float(site.site.layer in chosen)

    def before_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        if "chosen" not in sites[0].state:
            self.draw(sites, 0)
        for site in sites:
            for gradient in site.g.values():
                _keep(gradient, site.state["chosen"])

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        count = phase_ended(self.every, self.n_boosters, step, n_steps)
        if not count:
            return
        for site in sites:
            if bool(site.state["chosen"].any()):
                site.fold()
            # Everywhere, or the draws of a slot would depend on who shares its pack.
            site.renew(count)
            forget(site)
        self.draw(sites, count)

    def ranks(self, sites: Sequence[SiteState]) -> list[Tensor]:
        return [total_rank(site, site.site.rank * site.state["chosen"]) for site in sites]


def _keep(gradient: Tensor, chosen: Tensor) -> None:
    """Zero the gradient [K, ...] of the slots that are not chosen, be it finite or not."""
    gradient.masked_fill_(per_slot(chosen == 0, gradient), 0.0)


register("xgblora", "expansion", __doc__, LoRA(), start=WeakBooster(), schedule=Boosting())
