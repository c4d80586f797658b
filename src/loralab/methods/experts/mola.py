"""MoLA, arXiv 2402.08562: a mixture of N_l LoRA experts where N_l differs by layer; the best has
more experts in higher layers, MoLA-▽ (2468).

In layer l: y = W0 x + s Σ_i ω_i(x) B_i A_i x, ω the top K of softmax(W_g x), divided by their sum.

:summary: Mixtures of LoRA experts with more experts in higher layers
:equation: y = W x + s sum_(i in top K) w_i B_i A_i x, with N_l experts in layer l
:trap: The number of a layer is counted over the adapted layers: adapting only the upper half shifts
    every stretch.
:trap: Where a layer has K experts or fewer, every one of them is used for every token.
:trap: The rank is each expert's: with "2,4,6,8" there are five per layer on average.
:title: Higher Layers Need More LoRA Experts
:authors: Chongyang Gao, Kezhen Chen, Jinmeng Rao, Baochen Sun, Ruibo Liu, Daiyi Peng, Yawen Zhang,
    Xiaoyuan Guo, Jie Yang, VS Subrahmanian
:source: arXiv 2402.08562, 2024: section 3, MoLA-▽ (2468)
:verified: authors' settings (GCYZSL/MoLA) and TUDB-Labs/MoE-PEFT's adapters/mola; the text was not
    to be had
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.experts._routing import (
    ROUTED_LAYERS,
    balance,
    check_experts,
    check_weights,
    chosen,
    expert_tensors,
    mix,
    router,
    top_k,
)
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class MoLA(Form):
    """Experts whose number depends on depth.

    Args:
        experts: how many, from the lowest layers to the highest, for as many equal stretches of
            the layers; the paper's other shapes are "8,6,4,2", "8,2,2,8" and "5,5,5,5".
        top_k: experts of a token, at most those that its layer has.
        balance: weight of the balance loss N Σ f_i P_i.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "W_g"})
    reads: ClassVar[frozenset[str]] = frozenset({"valid"})
    layers: ClassVar[frozenset[str]] = ROUTED_LAYERS

    experts: str = "2,4,6,8"
    top_k: int = 2
    # The weight is that of MoE-PEFT's configuration; the paper's was not to be had.
    balance: float = 0.001

    def __post_init__(self) -> None:
        words = self.experts.split(",")
        if not all(word.strip().isdecimal() for word in words):
            raise UserError(
                f"experts of MoLA are numbers with commas between, such as '2,4,6,8', not "
                f"{self.experts!r}"
            )
        for word in words:
            check_experts("MoLA", int(word))
        check_experts("MoLA", max(map(int, words)), self.top_k)
        check_weights("MoLA", balance=self.balance)

    def n_experts(self, site: Site) -> int:
        """Return N_l of the site's layer."""
        numbers = [int(word) for word in self.experts.split(",")]
        return numbers[min(site.layer * len(numbers) // site.n_layers, len(numbers) - 1)]

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [N_l r, in], B [out, N_l r] = 0 and W_g [N_l, in]."""
        return expert_tensors(site, evidence, self.n_experts(site))

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        return mix(top_k(router(t, x), self.top_k), x, t["A"], t["B"])

    def aux_loss(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        p = router(t, x)
        return self.balance * balance(p, chosen(p, self.top_k), t)


register("mola", "experts", __doc__, MoLA())
