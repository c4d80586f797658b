"""LoRA-FA, arXiv 2308.03303, section 3: A keeps its random start, only B is trained.

dW = s B A0 then lives in the row space of A0, and the backward pass needs x A0ᵀ instead of x.
"""

from dataclasses import dataclass
from typing import ClassVar

from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.recipe import Method, Paper, Recipe
from loralab.training.adamw import AdamW


@dataclass(frozen=True)
class FrozenA(AdamW):
    """AdamW on everything but A.

    PEFT also multiplies the gradient of B by (A Aᵀ)⁻¹; the paper does not.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"A"})

    def trains(self, name: str) -> bool:
        return name != "A"


register(
    Method(
        name="lora_fa",
        axis="optimization",
        recipe=Recipe(LoRA(), rule=FrozenA()),
        paper=Paper(
            title="LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models "
            "Fine-tuning",
            authors="Longteng Zhang, Lin Zhang, Shaohuai Shi, Xiaowen Chu, Bo Li",
            year=2023,
            arxiv="2308.03303",
            equation="section 3",
            verified="the survey arXiv 2601.22708 and LoRAFactory's code",
        ),
        summary="Freezes A at its random start and trains B alone",
        equation="dW = s B A0",
        traps=("Whatever re-enables gradients on A (toggling an adapter, say) undoes the method.",),
    )
)
