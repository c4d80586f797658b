"""MoLA: a mixture of N_l LoRA experts where N_l differs by layer l.

The weights w are the top K of softmax(W_g x), divided by their sum. Most experts in higher layers,
MoLA-▽ (2468), is best for LLaMA-2 and Gemma in the published text, and 2882 for Mistral. The
balance loss is per adapted matrix; the authors' code, if asked for it, has one per layer.

:summary: Mixtures of LoRA experts with more experts in higher layers
:equation: y = W x + s sum_(i in top K) w_i B_i A_i x, with N_l experts in layer l
:trap: The number of a layer is counted over the adapted layers: adapting only the upper half shifts
    every stretch.
:trap: Where a layer has K experts or fewer, every one of them is used for every token.
:trap: The rank is each expert's: with "2,4,6,8" there are five per layer on average.
:title: Higher Layers Need More LoRA Experts
:authors: Chongyang Gao, Kezhen Chen, Jinmeng Rao, Baochen Sun, Ruibo Liu, Daiyi Peng, Yawen Zhang,
    Xiaoyuan Guo, Jie Yang, VS Subrahmanian
:source: arXiv 2402.08562, 2024: eqs. 3 and 4, MoLA-▽ (2468)
:verified: the published text (MoLA: MoE LoRA with Layer-wise Expert Allocation, Findings of NAACL
    2025, section 4, eqs. 3 and 4, and 5.4) and the authors' code (GCYZSL/MoLA, src/)
"""

from dataclasses import dataclass

from torch import Tensor

from loralab.bounds import Count, NonNegative
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.experts import _routing as routing
from loralab.methods.experts._experts import Routed, check_experts, expert_tensors
from loralab.recipe import Evidence, Site, Tensors


@dataclass(frozen=True)
class MoLA(Routed):
    """Experts whose number depends on depth.

    Args:
        experts: how many, from the lowest layers to the highest, for as many equal stretches of
            the layers; the paper's other shapes are "8,6,4,2", "8,2,2,8", "2,8,8,2" and "5,5,5,5".
        top_k: K, at most the experts that the layer has.
        balance: weight of N Σ f_i P_i, f_i the share of all picks; the authors' code's.
    """

    experts: str = "2,4,6,8"
    top_k: Count = 2
    balance: NonNegative = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        words = self.experts.split(",")
        if not all(word.strip().isdecimal() and int(word) >= 1 for word in words):
            form = "numbers from 1 on with commas between, such as '2,4,6,8'"
            raise UserError(f"experts of MoLA are {form}, not {self.experts!r}")
        check_experts("MoLA", max(self.numbers), self.top_k)

    @property
    def numbers(self) -> list[int]:
        """The numbers in `experts`."""
        return [int(word) for word in self.experts.split(",")]

    def n_experts(self, site: Site) -> int:
        """Return N_l of the site's layer."""
        stretch = site.layer * len(self.numbers) // site.n_layers
        return self.numbers[min(stretch, len(self.numbers) - 1)]

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [N_l r, in], B [out, N_l r] = 0 and W_g [N_l, in]."""
        return expert_tensors(site, evidence, self.n_experts(site))

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        omega = routing.top_k(routing.router(t, x), self.top_k)
        return routing.mix(omega, x, t["A"], t["B"])

    def aux_loss(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        p = routing.router(t, x)
        picks = min(self.top_k, self.n_experts(site))  # of each token, so that Σ_i f_i = 1
        return self.balance * routing.balance(p, routing.chosen(p, self.top_k), t) / picks


register("mola", "experts", __doc__, MoLA())
