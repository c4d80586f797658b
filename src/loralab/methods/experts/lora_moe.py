"""LoRAMoE, arXiv 2312.09979, section 3: y = W0 x + s Σ_i ω_i(x) B_i A_i x, ω = softmax(W_g x).

Localized balancing constraint: β σ²(Z) / μ(Z), Z = I ∘ Q, with Q_nm = Σ_j ω_n(x_j) over the tokens
of sample m, and I_nm = 1 + δ if expert n and sample m are of one type and 1 - δ if not.

:summary: LoRA experts under a dense router, some kept for world knowledge by a loss
:equation: y = W x + s sum_i softmax(W_g x)_i B_i A_i x; loss + beta var(Z) / mean(Z)
:trap: The rank is each expert's: six experts of rank r have six times LoRA's parameters.
:trap: The weights depend on the token, so there is no dW and it cannot be merged.
:trap: Without `given(domain=...)`, one number per row and -1 for unknown, the constraint is plain
    balancing: no expert is kept for anything.
:trap: The constraint sums over tokens, so it grows with the length of the sequences.
:title: LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin
:authors: Shihan Dou, Enyu Zhou, Yan Liu, Songyang Gao, Jun Zhao, Wei Shen, Yuhao Zhou, Zhiheng Xi,
    Xiao Wang, Xiaoran Fan, Shiliang Pu, Jiang Zhu, Rui Zheng, Tao Gui, Qi Zhang, Xuanjing Huang
:source: arXiv 2312.09979, 2023: section 3, localized balancing constraint
:verified: authors' code (Ablustrund/LoRAMoE, peft/tuners/lora.py and run_loramoe.sh); the survey
    arXiv 2601.22708 and CITI, which restates it, for the constraint; six experts as in MoE-PEFT's
    template; the paper's own text was not to be had, so the loss's weights are unconfirmed
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import Count, NonNegative, Share
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.experts import _routing as routing
from loralab.recipe import Evidence, Site, Tensors


@dataclass(frozen=True)
class LoRAMoE(routing.Routed):
    """Experts under a dense softmax router, in groups for types of data.

    Args:
        n_experts: N; the paper has three for tasks and three for world knowledge.
        n_types: groups of experts; expert n is of type n n_types // N.
        top_k: keep this many experts of a token (LoRAFactory's generic router); None keeps all, as
            in the paper.
        balance: β; 0 leaves the constraint out.
        imbalance: δ, how unequal the groups shall be.
        squared_mean: divide σ² by μ² as the authors' code does, not by μ as the paper does; the
            code's σ² has n - 1 below, ours n.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"domain", "valid"})
    by_sequence: ClassVar[bool] = True

    n_experts: Count = 6
    n_types: Count = 2
    top_k: Count | None = None
    balance: NonNegative = 0.1
    imbalance: Share = 0.1
    squared_mean: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        routing.check_experts("LoRAMoE", self.n_experts, self.top_k or 1)
        if self.n_types > self.n_experts:
            raise UserError(f"n_types of LoRAMoE is from 1 to n_experts, not {self.n_types}")

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [N r, in], B [out, N r] = 0 and W_g [N, in]."""
        return routing.expert_tensors(site, evidence, self.n_experts)

    def weights(self, t: Tensors, x: Tensor) -> Tensor:
        """Return ω [*, rows, tokens, N]."""
        p = routing.router(t, x.flatten(-3, -2)).unflatten(-2, x.shape[-3:-1])
        return p if self.top_k is None else routing.top_k(p, self.top_k)

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        return routing.mix_rows(self.weights(t, x), x, t["A"], t["B"])

    def aux_loss(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        omega = self.weights(t, x)
        if "valid" in t:
            omega = omega * t["valid"].to(omega.dtype).unsqueeze(-1)
        Z = omega.sum(-2)  # Q, [*, rows, N]
        if "domain" in t:  # without labels every expert is of every sample's type
            kinds = torch.arange(self.n_experts, device=Z.device) * self.n_types // self.n_experts
            domain = t["domain"].unsqueeze(-1)
            side = (2 * (domain == kinds).to(Z.dtype) - 1) * (domain >= 0)
            Z = Z * (1 + self.imbalance * side)
        Z = Z.flatten(-2)
        mean = Z.mean(-1).clamp_min(torch.finfo(Z.dtype).tiny)
        loss = self.balance * Z.var(-1, correction=0) / mean
        return loss / mean if self.squared_mean else loss


register("lora_moe", "experts", __doc__, LoRAMoE())
