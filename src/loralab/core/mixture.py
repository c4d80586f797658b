"""Experts side by side, mixed by weights per token: the inputs alone are kept for backward."""

from typing import Any

import torch
from torch import Tensor


class Mixture(torch.autograd.Function):
    """y = Σ_i ω_i(x) B_i A_i x; backward makes every expert's A_i x anew.

    Shapes: ω [*, n, N], x [*, n, in], A [*, N r, in], B [*, out, N r]. Twice differentiable.
    """

    @staticmethod
    def forward(ctx: Any, omega: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Return y [*, n, out]; the weights are rounded to x's dtype."""
        ctx.save_for_backward(omega, x, A, B)
        return _times(omega, x @ A.mT, fresh=True) @ B.mT

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of ω, x, A and B."""
        omega, x, A, B = ctx.saved_tensors
        fresh = not torch.is_grad_enabled()
        h, dh = x @ A.mT, dy @ B
        d_omega = None
        if ctx.needs_input_grad[0]:
            d_omega = (_parts(h, omega) * _parts(dh, omega)).sum(-1).to(omega.dtype)
        _, needs_x, needs_A, needs_B = ctx.needs_input_grad
        dB = dy.mT @ _times(omega, h, fresh) if needs_B else None
        dh = _times(omega, dh, fresh)
        return d_omega, dh @ A if needs_x else None, dh.mT @ x if needs_A else None, dB


def _parts(h: Tensor, omega: Tensor) -> Tensor:
    """Return h [*, n, N r] as [*, n, N, r]."""
    return h.unflatten(-1, (omega.shape[-1], -1))


def _times(omega: Tensor, h: Tensor, fresh: bool) -> Tensor:
    """Return every expert's own part of h times its weight, in place if h is `fresh`."""
    parts, weights = _parts(h, omega), omega.to(h.dtype).unsqueeze(-1)
    return (parts.mul_(weights) if fresh else parts * weights).flatten(-2)
