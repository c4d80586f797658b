"""MixLoRA, arXiv 2404.15159: LoRA experts in the feed-forward block, chosen per token, and plain
LoRA in attention: y = W0 x + s Σ_{i ∈ top-k} ω_i B_i A_i x, ω the top k of softmax(W_g x), divided
by their sum, with the balance loss a N Σ_i F_i P_i.

In the paper one router reads the block's input and an expert is a whole feed-forward block, mixed
after its last layer. Here every feed-forward layer has a router that reads the layer's own input
and mixes there; gate and up projection see the same input as in the paper, the down projection the
mixture.

:summary: Top-k LoRA experts in the feed-forward layers, plain LoRA in attention
:equation: y = W x + s sum_(i in top k) w_i B_i A_i x; loss + a N sum_i F_i P_i
:trap: The paper routes once per feed-forward block; here each of its layers routes.
:trap: A layer is taken for attention if its name has 'attn' or 'attention' in it.
:trap: The rank is each expert's: eight experts of rank r have eight times LoRA's parameters.
:title: MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts
:authors: Dengchun Li, Yingzi Ma, Naizheng Wang, Zhengmao Ye, Zhiyuan Cheng, Yinghao Tang, Yan
    Zhang, Lei Duan, Jie Zuo, Cal Yang, Mingjie Tang
:source: arXiv 2404.15159, 2024: section 3, top-k router and balance loss
:verified: authors' code (TUDB-Labs/MixLoRA, mixlora/model.py; TUDB-Labs/MoE-PEFT,
    adapters/mixlora), layer by layer instead of per block; the paper's own text was not to be had
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.methods import register
from loralab.methods.expansion.lora import plain_pair
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
class MixLoRA(Form):
    """Experts, except in attention, where there is one pair.

    Args:
        n_experts: N.
        top_k: experts of a token.
        balance: a, the weight of the balance loss.
        router_std: the router starts from N(0, router_std²).
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    reads: ClassVar[frozenset[str]] = frozenset({"valid"})
    layers: ClassVar[frozenset[str]] = ROUTED_LAYERS

    n_experts: int = 8
    top_k: int = 2
    balance: float = 0.01
    router_std: float = 0.02

    def __post_init__(self) -> None:
        check_experts("MixLoRA", self.n_experts, self.top_k)
        check_weights("MixLoRA", balance=self.balance)

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [N r, in], B [out, N r] = 0 and W_g [N, in], or A and B alone in attention."""
        if "attn" in site.name.lower() or "attention" in site.name.lower():
            return plain_pair(site, evidence)
        shape = (self.n_experts, site.d_in)
        draw = torch.randn(shape, generator=evidence.generator("W_g"), dtype=torch.float64)
        W_g = (draw * self.router_std).to(evidence.weight)
        return expert_tensors(site, evidence, self.n_experts) | {"W_g": W_g}

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        if "W_g" not in t:
            return (x @ t["A"].mT) @ t["B"].mT
        return mix(top_k(router(t, x), self.top_k), x, t["A"], t["B"])

    def aux_loss(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        if "W_g" not in t:
            return t["A"].new_zeros(t["A"].shape[:-2])
        p = router(t, x)
        return self.balance * balance(p, chosen(p, self.top_k), t)


register("mixlora", "experts", __doc__, MixLoRA())
