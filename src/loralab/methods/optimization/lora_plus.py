"""LoRA+: η_B = λ η_A with λ > 1, by default 2⁴ = 16.

Theorem 1: with Adam, A and B both move the output by Θ(1) at η_A = Θ(1/n) and η_B = Θ(1), so that
η_B / η_A grows with the width n; at equal rates one does not, or the output is not stable.

:summary: Trains B with 16 times the learning rate of A
:equation: lr_B = 16 lr_A
:trap: The reported learning rate is A's; at equal rate B moves 16 times faster than LoRA's.
:trap: Weight decay is decoupled, so B also decays 16 times faster.
:trap: The paper finds 2^4 on RoBERTa from B random and A = 0 (its Init[2]), 2^2 to 2^3 from LoRA's
    start (Init[1]), which is ours, and 2^1 to 2^2 on Llama.
:title: LoRA+: Efficient Low Rank Adaptation of Large Models
:authors: Soufiane Hayou, Nikhil Ghosh, Bin Yu
:source: arXiv 2402.12354, 2024: theorem 1 (section 4); section 5.3, λ = 2^4
:verified: the paper (definitions 3 to 5, theorem 1, section 5.3, appendix C.7); installed PEFT's
    optimizer, the survey arXiv 2601.22708
"""

from dataclasses import dataclass
from typing import ClassVar

from loralab.bounds import Positive
from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.training.adamw import AdamW


@dataclass(frozen=True)
class LoRAPlus(AdamW):
    """AdamW with a larger learning rate for B.

    Args:
        ratio: η_B / η_A. The trial's learning rate is η_A.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"B"})

    ratio: Positive = 16.0

    def lr_ratio(self, name: str) -> float:
        # B alone: DoRA's magnitude and every other tensor keep the trial's rate.
        return self.ratio if name == "B" else 1.0


register("lora_plus", "optimization", __doc__, LoRA(), rule=LoRAPlus())
