"""MixLoRA: experts that are whole feed-forward blocks, chosen per token; plain LoRA in attention.

An expert E_i is the frozen block with LoRA pairs of its own on every layer. Feed-forward layers
that share no module (BERT, OPT) are a block each. Eq. 7 prints no division by the sum, without
which the block would start at a part of its output. The blocks' balance losses are averaged.

:summary: Top-k experts that are whole feed-forward blocks, and plain LoRA in attention
:equation: y = sum_i w_i E_i(x), w the top k of softmax(W_g x) over their sum; + a N sum_i F_i P_i
:trap: Every token passes the block k times: mixing after each layer is another function.
:trap: A layer is taken for attention if its name has 'attn' or 'attention' in it.
:trap: The rank is each expert's: eight experts of rank r have eight times LoRA's parameters.
:title: MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts
:authors: Dengchun Li, Yingzi Ma, Naizheng Wang, Zhengmao Ye, Zhiyuan Cheng, Yinghao Tang, Yan
    Zhang, Lei Duan, Jie Zuo, Cal Yang, Mingjie Tang
:source: arXiv 2404.15159, 2024: section 3.2, eqs. 6 to 9
:verified: paper and authors' code (TUDB-Labs/MixLoRA, mixlora/model.py)
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import one_hot

from loralab.bounds import Positive
from loralab.methods import register
from loralab.methods.expansion.lora import normal, plain_pair
from loralab.methods.experts._experts import TopK
from loralab.methods.experts._routing import balance, chosen, mix, router, top_k
from loralab.recipe import Evidence, Site, Tensors


@dataclass(frozen=True)
class MixLoRA(TopK):
    """N pairs and a router per feed-forward block; one pair in attention.

    Args:
        router_std: the router starts from N(0, router_std²).
        load: eq. 9 counts a token's "first" expert and cuts P to its k; "all" k and no cut (code).
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    reads: ClassVar[frozenset[str]] = frozenset({"valid", "expert"})
    layers: ClassVar[frozenset[str]] = frozenset({"Linear", "Conv1D"})

    router_std: Positive = 0.02
    load: Literal["first", "all"] = "first"

    def routes(self, site: Site) -> bool:
        return not any(part in site.name.lower() for part in ("attn", "attention"))

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [N r, in], B = 0, and W_g [N, in] where a block is led; or a pair."""
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
        p, k = router(t, x), self.top_k
        P, F = (p, chosen(p, k)) if self.load == "all" else (p * chosen(p, k), chosen(p, 1))
        return self.balance * balance(P, F, t) / site.n_layers


register("mixlora", "experts", __doc__, MixLoRA())
