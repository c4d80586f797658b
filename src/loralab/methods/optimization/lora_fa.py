"""LoRA-FA: A keeps its random start, only B is trained.

dW = s B A0 then lives in the row space of A0, and the backward pass needs x A0ᵀ instead of x.

:summary: Freezes A at its random start and trains B alone
:equation: dW = s B A0
:trap: Whatever re-enables gradients on A (toggling an adapter, say) undoes the method.
:title: LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning
:authors: Longteng Zhang, Lin Zhang, Shaohuai Shi, Xiaowen Chu, Bo Li
:source: arXiv 2308.03303, 2023: section 3
:verified: the survey arXiv 2601.22708 and LoRAFactory's code
"""

from dataclasses import dataclass
from typing import ClassVar

from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.training.adamw import AdamW


@dataclass(frozen=True)
class FrozenA(AdamW):
    """AdamW on everything but A.

    PEFT also multiplies the gradient of B by (A Aᵀ)⁻¹; the paper does not.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"A"})

    def trains(self, name: str) -> bool:
        return name != "A"


register("lora_fa", "optimization", __doc__, LoRA(), rule=FrozenA())
