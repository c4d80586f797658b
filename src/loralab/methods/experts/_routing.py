"""What mixtures of LoRA experts share: their tensors, their gates, their mixing, their balance.

The experts lie side by side: expert i has rows i r to (i + 1) r of A [N r, in] and these columns of
B [out, N r]. So all experts of all tokens are two plain products, without a loop and a gather.

Gates are in fp32 (fp64 for an fp64 base) until `weighted`, so that a model in half precision
chooses the experts that it would choose in fp32.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import Count, NonNegative
from loralab.core.again import RunAgain
from loralab.core.layers import wide
from loralab.errors import UserError
from loralab.methods.expansion.lora import uniform
from loralab.recipe import LAYERS, Evidence, Form, Site, Tensors

# Not on an Embedding, whose inputs are one-hot: a router would be a second table of its size.
ROUTED_LAYERS = LAYERS - {"Embedding"}


def expert_tensors(site: Site, evidence: Evidence, n_experts: int) -> Tensors:
    """Return N experts' A ~ U(±1/√n) [N r, in] and B = 0 [out, N r], and the router W_g [N, in].

    The router starts as a linear layer does, from U(±1/√n).
    """
    n, width = site.d_in, n_experts * site.rank
    return {
        "A": uniform(evidence, "A", width, n, bound=n**-0.5),
        "B": evidence.weight.new_zeros(site.d_out, width),
        "W_g": uniform(evidence, "W_g", n_experts, n, bound=n**-0.5),
    }


def logits(W_g: Tensor, x: Tensor) -> Tensor:
    """Return W_g x, [*, n, N], in fp32 or fp64."""
    if wide(x) is x:
        return x @ W_g.mT
    # Run again in backward, which would keep a copy of x in fp32 otherwise.
    return RunAgain.apply(lambda values: wide(values[0]) @ wide(values[1]).mT, x, W_g)


def router(t: Tensors, x: Tensor) -> Tensor:
    """Return p = softmax(W_g x), [*, n, N], in fp32 or fp64."""
    return logits(t["W_g"], x).softmax(-1)


def chosen(p: Tensor, k: int) -> Tensor:
    """Return 1 for each token's k largest probabilities, else 0; of equal ones the first count."""
    order = p.detach().argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(p).scatter(-1, order, 1.0)


def top_k(p: Tensor, k: int) -> Tensor:
    """Return the k largest probabilities divided by their sum and 0 for the others, [*, n, N]."""
    kept = p * chosen(p, k)
    return kept / kept.sum(-1, keepdim=True)


def mix(omega: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return Σ_i ω_i(x) B_i A_i x for x [*, n, in] and ω [*, n, N], as [*, n, out]."""
    return weighted(omega, x @ A.mT) @ B.mT


def mix_rows(omega: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return `mix` for x [*, rows, tokens, in] and ω [*, rows, tokens, N]."""
    y = mix(omega.flatten(-3, -2), x.flatten(-3, -2), A, B)
    return y.unflatten(-2, x.shape[-3:-1])


def weighted(omega: Tensor, h: Tensor) -> Tensor:
    """Return every expert's own part of h [*, n, N r] times its weight, in h's dtype."""
    parts = h.unflatten(-1, (omega.shape[-1], -1))
    return (parts * omega.to(h.dtype).unsqueeze(-1)).flatten(-2)


def token_mean(values: Tensor, t: Tensors) -> Tensor:
    """Return the mean of values [*, n, N] over the real tokens, [*, N]."""
    valid = t.get("valid")
    if valid is None:
        return values.mean(-2)
    v = valid.to(values.dtype).unsqueeze(-1)
    return (values * v).sum(-2) / v.sum(-2).clamp_min(1)


def balance(p: Tensor, selected: Tensor, t: Tensors) -> Tensor:
    """Return N Σ_i f_i P_i per slot (Switch Transformers, arXiv 2101.03961, eq. 4).

    f_i is the share of the real tokens that selected expert i, P_i the mean of p_i over them.
    """
    f, P = token_mean(selected, t), token_mean(p, t)
    return p.shape[-1] * (f * P).sum(-1)


def check_experts(method: str, n_experts: int, k: int) -> None:
    """Raise UserError if more experts shall be chosen than there are."""
    if k > n_experts:
        raise UserError(f"top_k of {method} is from 1 to its {n_experts} experts, not {k}")


class Routed(Form):
    """Base of Forms whose experts A, B lie side by side under a router W_g."""

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "W_g"})
    reads: ClassVar[frozenset[str]] = frozenset({"valid"})
    layers: ClassVar[frozenset[str]] = ROUTED_LAYERS


@dataclass(frozen=True)
class TopK(Routed):
    """y = Σ ω_i(x) B_i A_i x, ω the top k of softmax(W_g x) divided by their sum.

    Args:
        n_experts: N.
        top_k: k, the experts of a token.
        balance: weight of the balance loss N Σ f_i P_i.
    """

    n_experts: Count = 8
    top_k: Count = 2
    balance: NonNegative = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_experts(type(self).__name__, self.n_experts, self.top_k)

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [N r, in], B [out, N r] = 0 and W_g [N, in]."""
        return expert_tensors(site, evidence, self.n_experts)

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        return mix(top_k(router(t, x), self.top_k), x, t["A"], t["B"])

    def aux_loss(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        p = router(t, x)
        return self.balance * balance(p, chosen(p, self.top_k), t)
