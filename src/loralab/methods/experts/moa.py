"""MoA (Mixture-of-LoRAs): one LoRA expert per domain d, and a router W_r that learns to tell d.

The paper first trains every expert on its own domain and then all with the router. Given domains,
an expert sees just its own rows here too. Without, the router's softmax mixes the experts. That the
router reads a sequence's mean input, and η, are our reading.

:summary: One LoRA expert per domain and a router that learns to tell the domains apart
:equation: y = W x + s B_d A_d x; loss + eta CE(W_r mean(x), d)
:trap: The domains are `given(domain=...)`, one number per row and -1 for unknown; without them it
    is a soft mixture over sequences.
:trap: The router reads the whole sequence, so generating with a cache routes each new token by
    itself unless the domain is given.
:trap: The rank is each expert's: eight experts of rank r have eight times LoRA's parameters.
:title: Mixture-of-LoRAs: An Efficient Multitask Tuning for Large Language Models
:authors: Wenfeng Feng, Chuzhan Hao, Yuewei Zhang, Yu Han, Hao Wang
:source: arXiv 2403.03432, 2024: explicit routing by domain labels
:verified: our reading of the abstract and of the survey arXiv 2601.22708; the text was not to be
    had
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from loralab.bounds import NonNegative
from loralab.methods import register
from loralab.methods.experts import _routing as routing
from loralab.methods.experts._experts import ByDomain
from loralab.recipe import Site, Tensors


@dataclass(frozen=True)
class MoA(ByDomain):
    """One expert per domain and a router over sequences.

    Args:
        n_experts: how many domains there are; W_g is W_r.
        hard: without a given domain take the router's first choice alone, as the paper does in
            use; the router then learns from given domains only.
        router_weight: η.
    """

    hard: bool = False
    router_weight: NonNegative = 0.1

    def logits(self, t: Tensors, x: Tensor) -> Tensor:
        """Return W_r x̄ for every row, [*, rows, N]."""
        return routing.logits(t["W_g"], routing.token_mean(x, t))

    def labels(self, t: Tensors) -> tuple[Tensor, Tensor]:
        """Return which rows have a domain (at least 0) and the domains one-hot, [*, rows, N]."""
        domain = t["domain"].long()
        return domain >= 0, F.one_hot(domain.clamp_min(0), self.n_experts)

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        omega = self.logits(t, x).softmax(-1)
        if self.hard:
            omega = routing.chosen(omega, 1)
        if "domain" in t:
            known, one_hot = self.labels(t)
            omega = one_hot.to(omega.dtype).where(known.unsqueeze(-1), omega)
        omega = omega.unsqueeze(-2).expand(*x.shape[:-1], -1)
        return routing.mix_rows(omega, x, t["A"], t["B"])

    def aux_loss(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        log_p = self.logits(t, x).log_softmax(-1)
        if "domain" not in t:
            return 0 * log_p.sum((-2, -1))
        known, one_hot = self.labels(t)
        rows = known.to(log_p.dtype)
        each = -(log_p * one_hot).sum(-1) * rows
        return self.router_weight * each.sum(-1) / rows.sum(-1).clamp_min(1)


register("moa", "experts", __doc__, MoA())
