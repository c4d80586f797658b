"""PeriodicLoRA, arXiv 2402.16141: after each stage a share m of the update is unloaded,
W ← W + m s B A, and the pair keeps the rest: A ← √(1 - m) A, B ← √(1 - m) B.

That is the paper's momentum-based unloading, which leaves the function as it is. m = 1 is its plain
unloading: all of the update goes and A, B start anew. Here the unloaded part goes to the adapter's
own frozen low-rank term, and W stays.

:summary: Unloads a share of the update every now and then and trains on with the rest
:equation: dW = s B A + U; per stage U <- U + m s B A, A, B <- sqrt(1 - m) (A, B)
:trap: Each stage adds r ranks to the frozen term, also where they repeat old directions.
:trap: If A and B both keep 1 - m, as in LoRAFactory, the function jumps at every stage.
:title: PeriodicLoRA: Breaking the Low-Rank Bottleneck in LoRA Optimization
:authors: Xiangdi Meng, Damai Dai, Weiyao Luo, Zhe Yang, Shaoxiang Wu, Xiaochen Wang, Peiyi Wang,
    Qingxiu Dong, Liang Chen, Zhifang Sui
:source: arXiv 2402.16141, 2024: momentum-based unloading
:verified: the first author's training script (a fork of FastChat), the abstract, the survey arXiv
    2601.22708 and LoRAFactory; the paper's text was not to be had
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.cola import check_phases, forget, phase_ended, total_rank
from loralab.methods.expansion.lora import LoRA
from loralab.recipe import Schedule, SiteState


@dataclass(frozen=True)
class Unloading(Schedule):
    """Unload a share of the update periodically.

    Args:
        every: optimizer steps per stage (250 in the authors' runs of some 7600); None cuts the run
            into `n_stages` equal ones.
        n_stages: used when `every` is None; the number is ours.
        momentum: m, the share unloaded, in (0, 1]; 0.1 in the authors' script.
        lopsided: A and B both keep 1 - m, so that the function changes, as LoRAFactory has it.
    """

    pair_only: ClassVar[bool] = True

    every: int | None = None
    n_stages: int = 5
    momentum: float = 0.1
    lopsided: bool = False

    def __post_init__(self) -> None:
        check_phases(self, "n_stages")
        if not 0 < self.momentum <= 1:
            raise UserError(f"momentum of PeriodicLoRA is a share in (0, 1], not {self.momentum!r}")

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        count = phase_ended(self.every, self.n_stages, step, n_steps)
        if not count:
            return
        for site in sites:
            if self.momentum == 1:
                site.restart(count)
            else:
                site.fold(self.momentum)
                left = 1 - self.momentum
                if self.lopsided and "A" in site.t:
                    site.t["A"].mul_(left)
                elif {"A", "B"} <= site.t.keys():  # `fold` left 1 - m of B and all of A
                    site.t["A"].mul_(left**0.5)
                    site.t["B"].div_(left**0.5)
            # The authors drop a random 99.9 % of each moment instead, by separate masks, which can
            # leave a first moment without its second.
            forget(site)

    def ranks(self, sites: Sequence[SiteState]) -> list[Tensor]:
        return [total_rank(site, site.site.rank) for site in sites]


register("periodic_lora", "expansion", __doc__, LoRA(), schedule=Unloading(), aliases=("plora",))
