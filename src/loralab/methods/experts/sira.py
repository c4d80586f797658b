"""SiRA, arXiv 2311.09179: y = W0 x + s Σ_{e ∈ top-K} G_e(x) B_e A_e x, sparse as in GShard
(arXiv 2006.16668): an expert takes at most C tokens, and those that come later go without it.

G = Dropout(softmax(W_g x)), dropping experts at random in training, and the auxiliary loss is
mean_e (c_e / S) m_e with c_e of S tokens routed to expert e and m_e the mean of G_e. The numbers
and the order of the steps are our reading.

:summary: Sparse LoRA experts with limited places and expert dropout
:equation: y = W x + s sum_(e in top K) G_e B_e A_e x, G = dropout(softmax(W_g x))
:trap: The gates are not divided by their sum, so the update shrinks as experts are many.
:trap: Places are given in the order of the batch: a token's update depends on those before it, in
    training only.
:trap: The rank is each expert's: sixteen experts of rank r have sixteen times LoRA's parameters.
:title: SiRA: Sparse Mixture of Low Rank Adaptation
:authors: Yun Zhu, Nevan Wichers, Chu-Cheng Lin, Xinyi Wang, Tianlong Chen, Lei Shu, Han Lu, Canoee
    Liu, Liangchen Luo, Jindong Chen, Lei Meng
:source: arXiv 2311.09179, 2023: top-k routing with capacity and expert dropout
:verified: our reading of the abstract and of GShard; the text was not to be had
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from loralab.bounds import Count, Decay, Positive
from loralab.methods import register
from loralab.methods.experts._experts import TopK
from loralab.methods.experts._routing import chosen, mix, router, token_mean
from loralab.recipe import Site, Tensors


@dataclass(frozen=True)
class SiRA(TopK):
    """Top-K experts with limited places, some dropped at random.

    Args:
        n_experts, top_k, balance: E, K and the weight of the auxiliary loss.
        capacity: C as a multiple of K S / E, the tokens of an expert under even routing; the
            limit holds in training, where it keeps popular experts from taking all.
        expert_dropout: probability with which a token does not see an expert, in training.
    """

    n_experts: Count = 16
    top_k: Count = 4
    capacity: Positive = 1.25
    expert_dropout: Decay = 0.1

    def draw(self, site: Site, n: int, generator: Generator) -> Tensors:
        """Return `kept` [n, E]: 0 where dropout takes an expert from a token."""
        u = torch.rand(n, self.n_experts, generator=generator)
        return {"kept": (u >= self.expert_dropout).float() / (1 - self.expert_dropout)}

    def gates(self, t: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return G [*, n, E] after dropout and 1 where an expert is chosen."""
        G = router(t, x)
        if "kept" in t:
            G = G * t["kept"].to(G.dtype)
        return G, chosen(G, self.top_k) * (G > 0)

    def within(self, selected: Tensor, t: Tensors) -> Tensor:
        """Return `selected` without the tokens that find their expert full."""
        real = t["valid"] > 0 if "valid" in t else torch.ones_like(selected[..., 0]).bool()
        C = (real.sum(-1) * (self.capacity * self.top_k / self.n_experts)).ceil()
        place = ((selected > 0) & real.unsqueeze(-1)).cumsum(-2)
        return selected * (place <= C[..., None, None])

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        G, selected = self.gates(t, x)
        if "kept" in t:
            selected = self.within(selected, t)
        return mix(G * selected, x, t["A"], t["B"])

    def aux_loss(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        G, selected = self.gates(t, x)
        return self.balance * (token_mean(selected, t) * token_mean(G, t)).mean(-1)


register("sira", "experts", __doc__, SiRA())
