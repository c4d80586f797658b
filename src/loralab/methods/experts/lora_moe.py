"""LoRAMoE: LoRA experts under a dense router, groups of them for types of data by a constraint.

It is β σ²(Z) / μ(Z), Z = I ∘ Q, with Q_nm = Σ_j ω_n(x_j) over the tokens of sample m, and
I_nm = 1 + δ if expert n and sample m are of one type and 1 - δ if not.

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
:verified: public readings of the paper (the constraint, β = δ = 0.1, 3 + 3 experts), authors' code
    (Ablustrund/LoRAMoE, peft/tuners/lora.py) and issue 3; the text itself was not to be had
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from loralab.bounds import Count, NonNegative, Share
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.experts import _routing as routing
from loralab.methods.experts._experts import ByDomain, check_experts
from loralab.recipe import Site, Tensors


@dataclass(frozen=True)
class LoRAMoE(ByDomain):
    """Experts under a dense softmax router, in groups for types of data.

    Args:
        n_experts: N; the paper has three for tasks and three for world knowledge, MoE-PEFT six.
        n_types: groups of experts; expert n is of type n n_types // N.
        top_k: keep this many experts of a token, as LoRAFactory does; None keeps all.
        balance, imbalance: β and δ.
        squared_mean: σ² / μ², as the authors' code (with n - 1 in σ²) and their issue 3 have it.
    """

    n_experts: Count = 6
    n_types: Count = 2
    top_k: Count | None = None
    balance: NonNegative = 0.1
    imbalance: Share = 0.1
    squared_mean: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_experts("LoRAMoE", self.n_experts, self.top_k or 1)
        if self.n_types > self.n_experts:
            raise UserError(f"n_types of LoRAMoE is from 1 to n_experts, not {self.n_types}")

    def weights(self, t: Tensors, x: Tensor) -> Tensor:
        """Return ω [*, rows, tokens, N]."""
        p = routing.router(t, x.flatten(-3, -2)).unflatten(-2, x.shape[-3:-1])
        return p if self.top_k is None else routing.top_k(p, self.top_k)

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        return routing.mix_rows(self.weights(t, x), x, t["A"], t["B"])

    def aux_loss(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        Z = routing.real(self.weights(t, x), t).sum(-2)  # Q, [*, rows, N]
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
