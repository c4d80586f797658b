"""LoRA-GA-Pro of LoRAFactory, the code of the survey arXiv 2601.22708 (lora_ga_pro.py).

LoRA-GA (arXiv 2407.05000) with half of the gradient's effective rank as each layer's rank,
r_i = ⌊erank(G_i) / 2⌋ within [4, 512] and half the layer's smaller side, since A and B take r_i
singular vectors each. No paper of this name could be found.

:summary: LoRA-GA with the rank that each layer's gradient shows
:equation: r_i = floor(erank(G_i) / 2), then LoRA-GA's A0 and B0
:trap: The rank asked for plays no part: there is no budget, and layers may grow a lot.
:trap: A layer with one input or output only gets rank 0 and is left out.
:trap: LoRAFactory scales by alpha over the rank asked for; here it is LoRA-GA's scale.
:title: A Unified Study of LoRA Variants
:authors: Haonan He, Jingqi Ye, Minglei Li, Zhengbo Wang, Mengqi Li, Tao Chen, Lei Bai, Peng Ye
:source: arXiv 2601.22708, 2026: its code LoRAFactory: lora_ga_pro.py
:verified: LoRAFactory's code (hhnqqq/MyTransformers); no paper of this name
"""

from collections.abc import Sequence
from dataclasses import dataclass

from loralab.bounds import Count
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.budgeting.gora import gradient_of
from loralab.methods.budgeting.ralora import effective_rank
from loralab.methods.initialization.lora_ga import LoRAGA
from loralab.methods.optimization.rslora import RSLORA_FORM
from loralab.recipe import Look, Site


@dataclass(frozen=True)
class LoRAGAPro(LoRAGA):
    """LoRA-GA at the rank that the gradient shows.

    Args:
        gamma, split, niter: see LoRA-GA.
        least, most: bounds of a rank.
    """

    least: Count = 4
    most: Count = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.least > self.most:
            raise UserError(
                "least and most of LoRA-GA-Pro are ranks, the least first, not "
                f"{self.least} and {self.most}"
            )

    def ranks(self, sites: Sequence[Site], evidence: Look) -> dict[str, int] | None:
        ranks = {}
        for site in sites:
            half = int(effective_rank(gradient_of(evidence(site), "LoRA-GA-Pro")) / 2)
            rank = max(self.least, min(half, self.most))
            ranks[site.name] = min(rank, min(site.d_in, site.d_out) // 2)
        return ranks


register("lora_ga_pro", "initialization", __doc__, RSLORA_FORM, start=LoRAGAPro())
