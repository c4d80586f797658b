"""Base layer, low-rank branch and gain as one autograd node: the fast path of plain layers.

y = g (x W^T + (x A^T) B^T) + b with W frozen. Saved for backward: x (in the base's dtype, the same
tensor for all layers that read it), h = x A^T (r wide), the small A, B, and, where there is a gain,
the output y, which the next operation usually keeps anyway. The update is added into the base
output in place. The backward is written in differentiable operations, so curvature can pass twice.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class FusedLowRank(torch.autograd.Function):
    """See the module's docstring: x [K, n, in], W [out, in], A [K, r, in], B [K, out, r]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        g: Tensor | None,
    ) -> Tensor:
        """Return y [K, n, out]; g is [K, out] or None."""
        h = torch.bmm(x, A.mT)
        y = F.linear(x.flatten(0, 1), weight, bias)
        y = y.view(*x.shape[:2], y.shape[-1]).baddbmm_(h, B.mT)
        if g is not None:
            y = y.mul_(g.unsqueeze(-2)) if y.dtype == g.dtype else (y * g.unsqueeze(-2)).to(y.dtype)
            if bias is not None:  # g (z - b) + b with z the biased sum: exact where g = 1
                y += (1 - g).unsqueeze(-2) * bias
        ctx.save_for_backward(x, weight, bias, A, B, h, g, None if g is None else y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A, B and g."""
        x, weight, bias, A, B, h, g, y = ctx.saved_tensors
        twice = torch.is_grad_enabled()
        if twice:  # the saved h is a constant to autograd
            h = torch.bmm(x, A.mT)
        dz, dg = dy, None
        if g is not None:
            dz = (dy * g.unsqueeze(-2)).to(dy.dtype)
            z_times_g = y if bias is None else y - bias
            inverse = torch.where(g == 0, torch.zeros_like(g), 1 / g)
            dg = (dy * z_times_g).sum(-2, dtype=g.dtype) * inverse
        dh = torch.bmm(dz, B)
        dA = torch.bmm(dh.mT, x) if ctx.needs_input_grad[3] else None
        dB = torch.bmm(dz.mT, h) if ctx.needs_input_grad[4] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(dz.flatten(0, 1), weight).view(x.shape)
            dx = torch.baddbmm(dx, dh, A) if twice else dx.baddbmm_(dh, A)
        return dx, None, None, dA, dB, dg
