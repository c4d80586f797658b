"""Products with a matrix that is made from small tensors: made again in backward, never kept."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from loralab.core.again import kept_inputs, rerun

Make = Callable[[list[Tensor]], Tensor]


def made_linear(make: Make, x: Tensor, bias: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
    """Return x Mᵀ + bias [K, n, out] with M [K, out, in] = make(tensors), for x [K, n, in]."""
    if torch.compiler.is_compiling():
        return kept_inputs(lambda v: _linear(v[0], make(v[1:]), bias), x, *tensors)
    return cast(Tensor, MadeLinear.apply(make, x, bias, *tensors))


def _linear(x: Tensor, M: Tensor, bias: Tensor | None) -> Tensor:
    M = M.to(x.dtype)
    if len(M) == 1:  # the very kernel of the base layer: step 0 is the base bit for bit
        return F.linear(x, M[0], bias)
    y = torch.bmm(x, M.mT)
    return y if bias is None else y.add_(bias)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b [K, ., .]; for a lone slot by `mm`, of which `bmm` takes up to 1.2 times."""
    return torch.bmm(a, b) if len(a) > 1 else torch.mm(a[0], b[0])[None]


class MadeLinear(torch.autograd.Function):
    """What `made_linear` returns, with M computed anew in backward. Twice differentiable."""

    @staticmethod
    def forward(ctx: Any, make: Make, x: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
        """Return y [K, n, out]."""
        ctx.make = make
        ctx.save_for_backward(x, *tensors)
        return _linear(x, make(list(tensors)), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and the tensors; the bias belongs to the frozen base."""
        x, *tensors = ctx.saved_tensors
        M, pull = rerun(ctx.make, tensors, ctx.needs_input_grad[3:])
        found = pull(lambda: _product(dy.mT, x).to(M.dtype))
        dx = None
        if ctx.needs_input_grad[1]:
            dx = _product(dy, M.to(dy.dtype).expand(len(dy), -1, -1))
        return None, dx, None, *found
