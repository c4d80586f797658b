"""Moments of gradients that are not the tensors' own: of rows, of a turned basis, of W's size.

U Vᵀ is B A, U the factor that moves and V the one that its gradient is seen through.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from loralab.recipe import SiteState, Tensors
from loralab.training.adamw import AdamW, per_slot
from loralab.training.gram import eigen, turned


def row_memory(site: SiteState) -> Tensors:
    """Return P [K, p, r, r] at 0 for both factors, v.A and v.B."""
    tall = {name: turned(name, site.t[name]) for name in ("A", "B")}
    return {"v." + name: U.new_zeros(*U.shape, U.shape[-1]) for name, U in tall.items()}


def carry_rows(P: Tensor, R: Tensor, g: Tensor, beta: float) -> None:
    """Set P_i to beta Rᵀ P_i R + (1 - beta) g_iᵀ g_i for every row i; P is [K, p, r, r]."""
    carried = R[:, None].mT @ P @ R[:, None]
    P.copy_(beta * carried + (1 - beta) * g[..., :, None] * g[..., None, :])


def row_roots(P: Tensor, V: Tensor) -> Tensor:
    """Return √diag(V P_i Vᵀ) for every row i, [K, p, q], which is of W's size."""
    products = (V[..., :, None] * V[..., None, :]).flatten(-2)
    return (P.flatten(-2) @ products.mT).clamp_min(0).sqrt()


def corrected(beta: float, turns: Tensor) -> Tensor:
    """Return the decay of step number `turns` with which a running mean has no bias from 0."""
    return beta * (1 - beta ** (turns - 1)) / (1 - beta**turns)


def whitened(g: Tensor, S: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Return g ((S + shift I)^½ + eps I)⁻¹ for S [*, r, r] positive semi-definite, in fp64."""
    root, Q = eigen(S)
    root = (root.clamp_min(0) + per_slot(shift, root)).sqrt() + eps
    return g @ (Q / root.unsqueeze(-2)) @ Q.mT


def lost(old: Tensor, new: Tensor) -> Tensor:
    """Return min(max_i λ_i(old) - λ_i(new), tr old - tr new) [*], at least 0.

    It is LoRA-RITE's d, the mass that a change of basis lost (arXiv 2410.20625, algorithm 1). A
    `resize` between the two matrices changes their size.
    """
    n = max(old.shape[-1], new.shape[-1])
    values, _ = eigen(torch.stack([F.pad(x, (0, n - x.shape[-1]) * 2) for x in (old, new)]))
    gaps = values[0] - values[1]
    return torch.minimum(gaps.amax(-1), gaps.sum(-1)).clamp_min(0)


def dense_adam(rule: AdamW, site: SiteState, g: Tensors) -> Tensors:
    """Return what AdamW makes of the effect of steps g of A and B on W, as gradients of A and B.

    The effect s (B g^A + g^B A) has the moments m and v; g̃ = m̂ / (√v̂ + ϵ) takes the place of a
    gradient of W, so that A's is s Bᵀg̃ and B's is s g̃ Aᵀ (LoRA-Pro, arXiv 2407.18242, algorithm 2).
    """
    A, B, state = site.t["A"], site.t["B"], site.state
    s = per_slot(site.scale.to(A), A)
    effect = torch.cat([B, g["B"]], -1) @ torch.cat([s * g["A"], s * A], -2)
    m, v = (state.setdefault(name, torch.zeros_like(effect)) for name in ("m.W", "v.W"))
    m.lerp_(effect, 1 - rule.beta1)
    v.mul_(rule.beta2).addcmul_(effect, effect, value=1 - rule.beta2)
    turns = state["turns"].double()
    one, two = (per_slot(1 - b**turns, m).to(m) for b in (rule.beta1, rule.beta2))
    adam = m / (v / two).sqrt_().add_(rule.eps).mul_(one)
    return {"A": s * (B.mT @ adam), "B": s * (adam @ A.mT)}
