"""What is around a Form's hooks: backward runs them again, and lays their gradients out anew."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loralab.recipe import Site, Tensors

Hook = Callable[[Tensors, Tensor, Site], Tensor]
Run = Callable[[list[Tensor]], Tensor]


class InRows(torch.autograd.Function):
    """x itself, whose gradient is laid out as x is.

    A hook that takes x's transpose gives a gradient in columns, and every operation before it would
    go on in columns: ten times as slow beside rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return x."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        """Return dx row by row."""
        return dx.contiguous()


def again(hook: Hook, t: Tensors, x: Tensor, site: Site) -> Tensor:
    """Return hook(t, x, site), of which autograd keeps t and x alone."""
    names = list(t)

    def run(values: list[Tensor]) -> Tensor:
        return hook(dict(zip(names, values, strict=False)), values[-1], site)

    return kept_inputs(run, *t.values(), x)


def kept_inputs(run: Run, *tensors: Tensor) -> Tensor:
    """Return run(tensors), of which autograd keeps the tensors alone."""
    if not torch.compiler.is_compiling():
        return cast(Tensor, RunAgain.apply(run, *tensors))
    if torch.compiler.is_exporting() or not any(t.requires_grad for t in tensors):
        return run(list(tensors))
    # The compiler cannot trace `rerun`, but knows what a checkpoint is.
    return cast(Tensor, checkpoint(lambda *v: run(list(v)), *tensors, use_reentrant=False))


class RunAgain(torch.autograd.Function):
    """y = run(tensors), computed anew in backward. Twice differentiable."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[list[Tensor]], Tensor], *tensors: Tensor) -> Tensor:
        """Return y."""
        ctx.run = run
        ctx.save_for_backward(*tensors)
        return run(list(tensors))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the tensors."""
        _, pull = rerun(ctx.run, ctx.saved_tensors, ctx.needs_input_grad[1:])
        return None, *pull(lambda: dy)


def rerun(
    run: Run, saved: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor, Callable[[Callable[[], Tensor]], list[Tensor | None]]]:
    """Run a function again inside a backward pass.

    Returns:
        Its result, and a function from the result's gradient (asked for only if there is somebody
        to take it) to the gradients of the saved tensors, None for those that need none.
    """
    needed = [i for i, need in enumerate(needs) if need]
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [v if twice else v.detach() for v in saved]
        for i in needed:
            if not twice:
                inputs[i].requires_grad_(True)
        y = run(inputs)

    def pull(dy: Callable[[], Tensor]) -> list[Tensor | None]:
        found: list[Tensor | None] = [None] * len(inputs)
        # A base made of frozen codes depends on none of the trained tensors.
        wanted = [inputs[i] for i in needed] if y.requires_grad else []
        if wanted:
            grads = torch.autograd.grad(y, wanted, dy(), create_graph=twice, allow_unused=True)
            for i, grad in zip(needed, grads, strict=True):
                found[i] = grad
        return found

    return y if twice else y.detach(), pull
