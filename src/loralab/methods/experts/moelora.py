"""MoELoRA, arXiv 2402.12851: y = W0 x + s Σ_{i ∈ top-k} G_i(x) E_i(x), E_i = B_i A_i, G from
softmax(W_g x), with a balance loss and an expert contrastive loss L_c: outputs of one expert are
alike, of two experts are not.

The losses are our reading. Here q = E_i(x_t) for every chosen expert of every token, and the keys
are all experts' outputs on the next token of the batch, E_i's being k⁺. So the cost is linear in
tokens.

:summary: Top-k LoRA experts that a contrastive loss keeps from learning the same
:equation: L_c = -log exp(q.k+ / tau) / sum_k exp(q.k / tau), q, k outputs of experts
:trap: While all B_i are 0 every output is 0 and the contrastive loss has no gradient.
:trap: The rank is each expert's: eight experts of rank r have eight times LoRA's parameters.
:trap: The name is also another paper's (arXiv 2310.18339, one expert weight per task).
:title: MoELoRA: Contrastive Learning Guided Mixture of Experts on Parameter-Efficient Fine-Tuning
    for Large Language Models
:authors: Tongxu Luo, Jiahe Lei, Fangyu Lei, Weihao Liu, Shizhu He, Jun Zhao, Kang Liu
:source: arXiv 2402.12851, 2024: experts contrastive loss
:verified: our reading of the abstract and of the survey arXiv 2601.22708; the text was not to be
    had, and neither were its loss weights and temperature
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import NonNegative, Positive
from loralab.methods import register
from loralab.methods.experts._experts import TopK
from loralab.methods.experts._routing import balance, chosen, router
from loralab.recipe import Site, Tensors


@dataclass(frozen=True)
class MoELoRA(TopK):
    """Top-k experts that a contrastive loss keeps distinct.

    Args:
        n_experts, top_k, balance: N, k and the weight of the balance loss N Σ f_i P_i.
        contrast: weight of the contrastive loss.
        temperature: its τ.
    """

    recomputed: ClassVar[frozenset[str]] = frozenset({"aux_loss"})  # all pairs

    contrast: NonNegative = 0.01
    temperature: Positive = 0.07

    def contrastive(self, t: Tensors, x: Tensor, selected: Tensor) -> Tensor:
        """Return L_c per slot, the mean over all queries."""
        N = self.n_experts
        h = (x @ t["A"].mT).mT.unflatten(-2, (N, -1))  # [*, N, r, n]
        gram = (t["B"].mT @ t["B"]).unflatten(-2, (N, -1))
        keys = torch.roll(h, -1, -1).unsqueeze(-4)
        # q·k = h_iᵀ B_iᵀ B_j h'_j, so that no output [N, out, n] is made.
        turned = (gram.mT @ h).unflatten(-2, (N, -1))
        alike = (turned * keys).sum(-2) / self.temperature  # [*, N, N, n]
        loss = -alike.log_softmax(-2).diagonal(dim1=-3, dim2=-2)
        if "valid" in t:
            pair = t["valid"] * torch.roll(t["valid"], -1, -1)
            selected = selected * pair.to(selected.dtype).unsqueeze(-1)
        return (loss * selected).sum((-2, -1)) / selected.sum((-2, -1)).clamp_min(1)

    def aux_loss(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        p = router(t, x)
        selected = chosen(p, self.top_k)
        contrast = self.contrast * self.contrastive(t, x, selected)
        return self.balance * balance(p, selected, t) + contrast


register("moelora", "experts", __doc__, MoELoRA())
