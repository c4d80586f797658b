"""Init[AB], arXiv 2505.23194: A and B both random, A, B ~ U(±γ/√n), so that B A ≠ 0 at first.

The paper leaves the pretrained weight uncorrected: the model starts at W + s B0 A0. The tuning
study arXiv 2602.04998 subtracts s B0 A0, which is our default (`anchored`).
"""

from dataclasses import dataclass

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import LoRA, uniform
from loralab.recipe import Evidence, Method, Paper, Recipe, Site, Start, Tensors


@dataclass(frozen=True)
class InitAB(Start):
    """Both factors random.

    Args:
        gamma: half-width of both draws in units of 1/√n, n the layer's inputs; positive. 1 in the
            tuning study; the survey arXiv 2601.22708 uses 16.
        anchored: subtract s B0 A0, so that step 0 is the base; False is the paper.
    """

    gamma: float = 1.0
    anchored: bool = True

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise UserError(f"gamma of Init[AB] must be positive, not {self.gamma!r}")

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        # Both bounds come from the inputs n, for B too (the study's code).
        bound = self.gamma * site.d_in**-0.5
        return {
            "A": uniform(evidence, "A", site.rank, site.d_in, bound=bound),
            "B": uniform(evidence, "B", site.d_out, site.rank, bound=bound),
        }


register(
    Method(
        name="init_ab",
        axis="initialization",
        recipe=Recipe(LoRA(), InitAB()),
        paper=Paper(
            title="Beyond Zero Initialization: Investigating the Impact of Non-Zero "
            "Initialization on LoRA Fine-Tuning Dynamics",
            authors="Shiwei Li, Xiandi Luo, Xing Tang, Haozhao Wang, Hao Chen, Weihong Luo, "
            "Yuhua Li, Xiuqiang He, Ruixuan Li",
            year=2025,
            arxiv="2505.23194",
            equation="Init[AB]",
            verified="abstract; bounds from the surveys and the tuning study's code",
        ),
        summary="Starts A and B both at random",
        equation="A0, B0 ~ U(±gamma/sqrt(n)), dW = s (B A - B0 A0)",
        traps=(
            "LoRAFactory's code draws within sqrt(gamma/n), the paper within gamma/sqrt(n).",
            "anchored=False perturbs the base before the first step, as the paper does.",
        ),
        aliases=("nzlora", "init[ab]"),
    )
)
