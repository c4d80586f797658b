"""Gates of mixtures of LoRA experts, the mixing, and the balance of its load.

The experts lie side by side: expert i has rows i r to (i + 1) r of A [N r, in] and these columns of
B [out, N r]. So all experts of all tokens are two plain products, without a loop and a gather.

Gates are in fp32 (fp64 for an fp64 base) until `mix`, so that a model in half precision
chooses the experts that it would choose in fp32.
"""

from typing import cast

import torch
from torch import Tensor

from loralab.core.again import kept_inputs
from loralab.core.layers import wide
from loralab.core.mixture import Mixture
from loralab.recipe import Tensors


def logits(W_g: Tensor, x: Tensor) -> Tensor:
    """Return W_g x, [*, n, N], in fp32 or fp64."""
    if wide(x) is x:
        return x @ W_g.mT
    # Run again in backward, which would keep a copy of x in fp32 otherwise.
    return kept_inputs(lambda values: wide(values[0]) @ wide(values[1]).mT, x, W_g)


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
    return cast(Tensor, Mixture.apply(omega, x, A, B))


def mix_rows(omega: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return `mix` for x [*, rows, tokens, in] and ω [*, rows, tokens, N]."""
    y = mix(omega.flatten(-3, -2), x.flatten(-3, -2), A, B)
    return y.unflatten(-2, x.shape[-3:-1])


def real(values: Tensor, t: Tensors) -> Tensor:
    """Return values [*, n, N] with 0 in the place of padding."""
    valid = t.get("valid")
    return values if valid is None else values * valid.to(values.dtype).unsqueeze(-1)


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
