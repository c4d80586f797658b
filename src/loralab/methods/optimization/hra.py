"""HRA: turns the input by Householder reflections H_i = I - 2 u_i u_iᵀ, z = W H_1 ... H_r x.

Eq. 6 adds λ ‖I - UᵀU‖² to the loss. Neighbours start equal, as in PEFT, and cancel; exactly so, as
a pair a, b is written by d = a - b: H_a H_b = I + [a, d] [-2 (d + |d|² b), 2 b]ᵀ, for 2 aᵀb =
2 - |d|². The product of all pairs is eq. 3's I + U Γ Uᵀ with a block-triangular core of size r.

:summary: Turns the layer's input by a chain of Householder reflections
:equation: W' = W (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T), |u_i| = 1
:trap: An odd number of reflections has determinant -1 and cannot start at the identity.
:trap: Only the direction of u_i acts, so its length sets the step that a rate makes.
:trap: The paper's λ = ∞ (Gram-Schmidt, PEFT's apply_GS) is not built: it cannot start at the base.
:title: Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection
    Adaptation
:authors: Shen Yuan, Haotian Liu, Hongteng Xu
:source: arXiv 2405.17484, 2024: eqs. 1, 3 and 6
:verified: paper; equality with installed PEFT
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from loralab.bounds import NonNegative
from loralab.core.layers import wide
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.methods.optimization._unscaled import Unscaled
from loralab.recipe import Evidence, Site, Tensors


def unit(U: Tensor) -> Tensor:
    """Return U [*, in, r] with columns of length 1."""
    return U / U.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(U.dtype).tiny)


@dataclass(frozen=True)
class HRA(Unscaled):
    """A chain of r reflections of the layer's input; the rank is r and must be even.

    Args:
        lam: λ of eq. 6; the paper takes 1e-5 to 1e-3, 1e-4 for language models, PEFT none.
    """

    lam: NonNegative = 1e-4

    @property
    def rank_multiple(self) -> int:
        return 2

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return U [in, r], columns 2i and 2i + 1 equal."""
        if site.rank % 2:
            raise UserError(f"HRA starts from pairs of reflections: no odd rank {site.rank}")
        half = uniform(evidence, "U", site.d_in, site.rank // 2, bound=(site.rank // 2) ** -0.5)
        return {"U": half.repeat_interleave(2, -1)}

    def inner(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        U = unit(wide(t["U"]))
        a, b = U[..., 0::2], U[..., 1::2]
        d = a - b
        L = torch.stack([a, d], -1).flatten(-2)  # pair by pair, [*, in, r]
        R = torch.stack([-2 * (d + d.square().sum(-2, keepdim=True) * b), 2 * b], -1).flatten(-2)
        # Π (I + L_i R_iᵀ) = I + L (I - N)⁻¹ Rᵀ, N the blocks of RᵀL above the diagonal ones.
        pair = torch.arange(L.shape[-1], device=x.device) // 2
        N = wide(R.mT @ L) * (pair[:, None] < pair)
        one = torch.eye(N.shape[-1], dtype=N.dtype, device=N.device)
        core = torch.linalg.solve_triangular((one - N).mT, L.mT, upper=False)
        return x + (x @ R.to(x.dtype)) @ core.to(x.dtype)

    def penalty(self, t: Tensors, site: Site) -> Tensor | None:
        if not self.lam:
            return None
        U = unit(t["U"])
        one = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
        return self.lam * (one - U.mT @ U).square().sum((-2, -1))


register("hra", "optimization", __doc__, HRA())
