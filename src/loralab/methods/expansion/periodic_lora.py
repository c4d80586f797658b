"""PeriodicLoRA: after each stage a share m of the update is unloaded into W and the pair keeps the
rest, so that the function stays as it is.

m = 1 is the paper's plain unloading: all of the update goes and A, B start anew. Here the unloaded
part U is the adapter's own frozen low-rank term, and W stays.

:summary: Unloads a share of the update every now and then and trains on with the rest
:equation: dW = s B A + U; per stage U <- U + m s B A, A, B <- sqrt(1 - m) (A, B)
:trap: Each stage adds r ranks to the frozen term, also where they repeat old directions.
:trap: If A and B both keep 1 - m, as in LoRAFactory, the function jumps at every stage.
:trap: The paper also restarts the learning-rate schedule at each stage; here the run keeps one.
:title: PeriodicLoRA: Breaking the Low-Rank Bottleneck in LoRA Optimization
:authors: Xiangdi Meng, Damai Dai, Weiyao Luo, Zhe Yang, Shaoxiang Wu, Xiaochen Wang, Peiyi Wang,
    Qingxiu Dong, Liang Chen, Zhifang Sui
:source: arXiv 2402.16141, 2024: momentum-based unloading
:verified: the first author's training script (a fork of FastChat), the abstract, the survey arXiv
    2601.22708 and LoRAFactory; the paper's text was not to be had
"""

from collections.abc import Sequence
from dataclasses import dataclass

from loralab.bounds import Count, SomeShare
from loralab.methods import register
from loralab.methods.expansion._phases import Phases, forget
from loralab.methods.expansion.lora import LoRA
from loralab.recipe import SiteState


@dataclass(frozen=True)
class Unloading(Phases):
    """Unload a share of the update periodically, every 250 steps in the authors' runs of some 7600.

    Args:
        n_stages: used when `every` is None; the number is ours.
        momentum: m, the share unloaded; 0.1 in the authors' script.
        lopsided: A and B both keep 1 - m, so that the function changes, as LoRAFactory has it.
    """

    n_stages: Count = 5
    momentum: SomeShare = 0.1
    lopsided: bool = False

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        if count := self.ended(self.n_stages, step, n_steps):
            for site in sites:
                self.unload(site, count)
                # The authors drop a random 99.9 % of each moment instead, by separate masks, which
                # can leave a first moment without its second.
                forget(site)

    def unload(self, site: SiteState, count: int) -> None:
        """Move m of the update to the frozen term."""
        if self.momentum == 1:
            site.restart(count)
            return
        site.fold(self.momentum)  # leaves 1 - m of B and all of A
        left = 1 - self.momentum
        if self.lopsided and "A" in site.t:
            site.t["A"].mul_(left)
        elif {"A", "B"} <= site.t.keys():
            site.t["A"].mul_(left**0.5)
            site.t["B"].div_(left**0.5)


register("periodic_lora", "expansion", __doc__, LoRA(), schedule=Unloading(), aliases=("plora",))
