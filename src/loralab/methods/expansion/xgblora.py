"""XGBLoRA: W_t = W_{t-1} + s B_t A_t, booster t of rank 1, trained for κ steps on L_s layers.

The paper adds it to W, unshrunk (α_t = 1 in eq. 8); here a frozen low-rank term takes it. The
norms of A and B that eq. 7 adds to the loss are weight decay here: their weight is not known.

:summary: Boosting: a chain of rank-1 updates, each on a few layers drawn at random
:equation: dW = s (B_1 A_1 + ... + B_T A_T), A_t, B_t of rank 1 and 0 outside L_s layers
:trap: The rank asked for has no effect unless booster_rank is None: boosters have rank 1.
:trap: A layer never drawn stays at the base; T L_s should well exceed the depth.
:trap: The layers not drawn still compute their gradients, which are then dropped.
:title: Less is More: Extreme Gradient Boost Rank-1 Adaption for Efficient Finetuning of LLMs
:authors: Yifei Zhang, Hao Zhu, Aiwei Liu, Han Yu, Piotr Koniusz, Irwin King
:source: arXiv 2410.19694, 2024: eq. 8
:verified: abstract, OpenReview's reviews, the survey arXiv 2601.22708; its text was not to be had
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.bounds import Count
from loralab.methods import register
from loralab.methods.expansion._phases import Phases, choose_blocks, forget, total_rank
from loralab.methods.expansion.lora import LoRA, plain_pair
from loralab.recipe import Evidence, Look, Site, SiteState, Start, Tensors
from loralab.training.adamw import per_slot


@dataclass(frozen=True)
class WeakBooster(Start):
    """LoRA's pair, at the boosters' rank: 1 in the paper; None for the rank asked for."""

    keeps_scale: ClassVar[bool] = True

    booster_rank: Count | None = 1

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        return plain_pair(site, evidence)

    def ranks(self, sites: Sequence[Site], evidence: Look) -> dict[str, int] | None:
        return {site.name: self.booster_rank for site in sites} if self.booster_rank else None


@dataclass(frozen=True)
class Boosting(Phases):
    """Train the pairs of a few layers at a time; `every` is κ.

    Args:
        n_boosters: used when `every` is None; the number is ours.
        n_layers: L_s, transformer blocks per booster; 2 in the survey arXiv 2601.22708, while 11 of
            32 are the best in the paper's table 6, as a review has it.
    """

    n_boosters: Count = 10
    n_layers: Count = 2

    def before_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        if "chosen" not in sites[0].state:
            choose_blocks(sites, self.n_layers, 0)
        for site in sites:
            for gradient in site.g.values():  # is 0 for the others, be it finite or not
                gradient.masked_fill_(per_slot(site.state["chosen"] == 0, gradient), 0.0)

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        if count := self.ended(self.n_boosters, step, n_steps):
            for site in sites:
                if bool(site.state["chosen"].any()):
                    site.fold()
                # Everywhere, or the draws of a slot would depend on who shares its pack.
                site.renew(count)
                forget(site)
            choose_blocks(sites, self.n_layers, count)

    def ranks(self, sites: Sequence[SiteState]) -> list[Tensor]:
        return [total_rank(site, site.site.rank * site.state["chosen"]) for site in sites]


register("xgblora", "expansion", __doc__, LoRA(), start=WeakBooster(), schedule=Boosting())
