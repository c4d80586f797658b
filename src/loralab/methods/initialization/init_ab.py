"""Init[AB], arXiv 2505.23194: A and B both random, A, B ~ U(±γ/√n), so that B A ≠ 0 at first.

The pretrained weight is left uncorrected, as in the paper: the model starts at W + s B0 A0. The
tuning study arXiv 2602.04998 subtracts s B0 A0, which is the option `anchored`.

:summary: Starts A and B both at random
:equation: A0, B0 ~ U(±gamma/sqrt(n)), dW = s B A
:trap: LoRAFactory's code draws within sqrt(gamma/n), the paper within gamma/sqrt(n).
:trap: It perturbs the base before the first step; anchored=True does not.
:title: Beyond Zero Initialization: Investigating the Impact of Non-Zero Initialization on LoRA
    Fine-Tuning Dynamics
:authors: Shiwei Li, Xiandi Luo, Xing Tang, Haozhao Wang, Hao Chen, Weihong Luo, Yuhua Li, Xiuqiang
    He, Ruixuan Li
:source: arXiv 2505.23194, 2025: Init[AB]
:verified: abstract; a public reading of the paper (papernotes, ICML 2025) for the law 1/n of both
    variances; bounds from the surveys and the tuning study's code; the paper's text was
    not to be had
"""

from dataclasses import dataclass
from typing import ClassVar

from loralab.bounds import Positive
from loralab.methods import register
from loralab.methods.expansion.lora import LoRA, uniform
from loralab.recipe import Evidence, Site, Start, Tensors


@dataclass(frozen=True)
class InitAB(Start):
    """Both factors random.

    Args:
        gamma: half-width of both draws in units of 1/√n, n the layer's inputs; 1 in the tuning
            study, 16 in the survey arXiv 2601.22708.
        anchored: subtract s B0 A0, so that step 0 is the base; the paper does not.
    """

    departs: ClassVar[bool] = True

    gamma: Positive = 1.0
    anchored: bool = False

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        # Both bounds come from the inputs n, for B too (the study's code).
        bound = self.gamma * site.d_in**-0.5
        return {
            "A": uniform(evidence, "A", site.rank, site.d_in, bound=bound),
            "B": uniform(evidence, "B", site.d_out, site.rank, bound=bound),
        }


register(
    "init_ab", "initialization", __doc__, LoRA(), start=InitAB(), aliases=("nzlora", "init[ab]")
)
