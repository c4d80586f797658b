"""MixLoRA: experts that are whole feed-forward blocks, chosen per token; plain LoRA in attention.

An expert E_i is the frozen block with LoRA pairs of its own on every layer. Feed-forward layers
that share no module (BERT, OPT) are a block each. The authors' code averages F and P over tokens
and blocks together before it multiplies them; here the blocks' losses are averaged.

:summary: Top-k experts that are whole feed-forward blocks, and plain LoRA in attention
:equation: y = sum_(i in top k) w_i E_i(x), w the top k of softmax(W_g x) over their sum; loss +
    a N sum_i F_i P_i
:trap: Mixing after each layer is another function: the activation stands between the layers.
:trap: Every token passes the block k times, the frozen layers too.
:trap: A layer is taken for attention if its name has 'attn' or 'attention' in it.
:trap: The rank is each expert's: eight experts of rank r have eight times LoRA's parameters.
:title: MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts
:authors: Dengchun Li, Yingzi Ma, Naizheng Wang, Zhengmao Ye, Zhiyuan Cheng, Yinghao Tang, Yan
    Zhang, Lei Duan, Jie Zuo, Cal Yang, Mingjie Tang
:source: arXiv 2404.15159, 2024: section 3.2, eqs. 6 to 9
:verified: authors' code (TUDB-Labs/MixLoRA, mixlora/model.py; MoE-PEFT, adapters/mixlora) and the
    paper, which has a = 0.01, no division by the sum and only a token's first expert in F
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import one_hot

from loralab.bounds import Positive
from loralab.methods import register
from loralab.methods.expansion.lora import normal, plain_pair
from loralab.methods.experts._experts import TopK
from loralab.methods.experts._routing import mix, router, top_k
from loralab.recipe import Evidence, Site, Tensors


@dataclass(frozen=True)
class MixLoRA(TopK):
    """N pairs and a router per feed-forward block; one pair in attention.

    Args:
        router_std: the router starts from N(0, router_std²).
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    reads: ClassVar[frozenset[str]] = frozenset({"valid", "expert"})
    layers: ClassVar[frozenset[str]] = frozenset({"Linear", "Conv1D"})

    router_std: Positive = 0.02

    def routes(self, site: Site) -> bool:
        name = site.name.lower()
        return "attn" not in name and "attention" not in name

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [N r, in], B [out, N r] = 0, and W_g [N, in] where a block is led; or a pair."""
        if not self.routes(site):
            return plain_pair(site, evidence)
        t = super().init(site, evidence)
        t["W_g"] = normal(evidence, "W_g", self.n_experts, site.d_in, std=self.router_std)
        return t if site.leads else {"A": t["A"], "B": t["B"]}

    def route(self, t: Tensors, x: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        w = top_k(router(t, x), self.top_k)
        expert = w.detach().argsort(dim=-1, descending=True, stable=True)[..., : self.top_k]
        return expert, w.gather(-1, expert)

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        if "expert" in t:
            return mix(one_hot(t["expert"], self.n_experts), x, t["A"], t["B"])
        if "W_g" in t:  # a block of one layer
            return super().branch(t, x, site)
        return (x @ t["A"].mT) @ t["B"].mT

    def aux_loss(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        if "W_g" not in t:
            return t["A"].new_zeros(t["A"].shape[:-2])
        return super().aux_loss(t, x, site) / site.n_layers


register("mixlora", "experts", __doc__, MixLoRA())
