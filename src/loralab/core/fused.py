"""Base layer, low-rank branch and gain as one autograd node: the fast path of plain layers.

y = g (x W^T + (x A^T) B^T) + b with W frozen. Saved for backward: x (in the base's dtype, the same
tensor for all layers that read it), h = x A^T (r wide), the small A, B, and, where there is a gain,
the output y, which the next operation usually keeps anyway. The update is added into the base
output in place. The backward is written in differentiable operations, so curvature can pass twice.

Products with a side of r are taken with r as their rows (h is kept as [K, r, n]): on CPUs they take
a quarter to all of the time of those with r as their columns.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loralab.core.scaling import scale_gradients


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
        h = torch.bmm(A, x.mT)
        y = F.linear(x.flatten(0, 1), weight, bias)
        y = y.view(*x.shape[:2], y.shape[-1]).baddbmm_(h.mT, B.mT)
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
        dz, dg = dy, None
        if g is not None:
            dz, dg = scale_gradients(dy, y if bias is None else y - bias, g)
        dh, dA, dB = _factor_gradients(x, A, B, h, dz, *ctx.needs_input_grad[3:5])
        dx = _input_gradient(dz, weight, dh, A) if ctx.needs_input_grad[0] else None
        return dx, None, None, dA, dB, dg


class AddLowRank(torch.autograd.Function):
    """y + (x A^T) B^T for a base output y [K, n, out], by the same products as FusedLowRank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Return a new tensor [K, n, out]; y is not written."""
        h = torch.bmm(A, x.mT)
        ctx.save_for_backward(x, A, B, h)
        return torch.baddbmm(y, h.mT, B.mT)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, y, A and B."""
        x, A, B, h = ctx.saved_tensors
        dh, dA, dB = _factor_gradients(x, A, B, h, dy, *ctx.needs_input_grad[2:4])
        dx = torch.bmm(dh.mT, A) if ctx.needs_input_grad[0] else None
        return dx, dy if ctx.needs_input_grad[1] else None, dA, dB


class AddHidden(torch.autograd.Function):
    """y + h^T B^T for h = A x^T [K, r, n], made outside where A is frozen: x is not kept."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, y: Tensor, B: Tensor) -> Tensor:
        """Return a new tensor [K, n, out]; y is not written."""
        ctx.save_for_backward(h, B)
        return torch.baddbmm(y, h.mT, B.mT)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of h, y and B."""
        needs_h, needs_y, needs_B = ctx.needs_input_grad
        h, B = ctx.saved_tensors
        dh, dB = _hidden_gradients(h, B, dy, needs_h, needs_B)
        return dh, dy if needs_y else None, dB


class FusedHidden(torch.autograd.Function):
    """x W^T + b + h^T B^T with W and A frozen and h = A x^T made outside: x is not kept.

    The whole gradient of x is taken here, in one tensor; h is an input only for second passes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, A: Tensor, B: Tensor
    ) -> Tensor:
        """Return y [K, n, out]."""
        ctx.save_for_backward(weight, h, A, B)
        y = F.linear(x.flatten(0, 1), weight, bias)
        return y.view(*x.shape[:2], y.shape[-1]).baddbmm_(h.mT, B.mT)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and B."""
        weight, h, A, B = ctx.saved_tensors
        needs_x, needs_B = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        dh, dB = _hidden_gradients(h, B, dy, needs_x, needs_B)
        dx = _input_gradient(dy, weight, dh, A) if dh is not None else None
        return dx, None, None, None, None, dB


def _input_gradient(dz: Tensor, weight: Tensor, dh: Tensor, A: Tensor) -> Tensor:
    """Return dx [K, n, in] of z = x W^T + (x A^T) B^T."""
    dx = torch.mm(dz.flatten(0, 1), weight).view(*dz.shape[:2], -1)
    return torch.baddbmm(dx, dh.mT, A) if torch.is_grad_enabled() else dx.baddbmm_(dh.mT, A)


def _factor_gradients(
    x: Tensor, A: Tensor, B: Tensor, h: Tensor, dz: Tensor, need_A: bool, need_B: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (dh [K, r, n], dA, dB) of z = (x A^T) B^T."""
    if torch.is_grad_enabled():  # a second pass goes through h, which is saved as a constant
        h = torch.bmm(A, x.mT)
    dh, dB = _hidden_gradients(h, B, dz, True, need_B)
    assert dh is not None
    return dh, torch.bmm(dh, x) if need_A else None, dB


def _hidden_gradients(
    h: Tensor, B: Tensor, dz: Tensor, need_h: bool, need_B: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return (dh [K, r, n], dB [K, out, r]) of z = h^T B^T."""
    dh = torch.bmm(_rows(B), dz.mT) if need_h else None
    return dh, torch.bmm(h, dz).mT.contiguous() if need_B else None


def _rows(B: Tensor) -> Tensor:
    """Return B^T; laid out anew where r is small: bmm takes two turned sides ten times as long."""
    if B.shape[-1] >= 8:
        return B.mT
    return B.mT.clone(memory_format=torch.contiguous_format)  # `contiguous` leaves r = 1 as it is
