"""What data-driven starts look at: gradients of the loss in the frozen weights."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from loralab.core.layers import oriented, wide
from loralab.errors import UserError

Loss = Callable[[nn.Module, Any], Tensor]


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return `model(**batch).loss`, the Hugging Face convention."""
    if not isinstance(batch, Mapping | tuple | list):
        raise UserError(
            f"a data batch is a mapping or a tuple of the model's inputs, not a "
            f"{type(batch).__name__}; pass loss= to read other batches"
        )
    out = model(**batch) if isinstance(batch, Mapping) else model(*batch)
    loss = getattr(out, "loss", None)
    if loss is None:
        raise UserError(
            "the model returned no .loss for a data batch; put labels in the batch or pass loss="
        )
    return loss


def weight_gradients(
    model: nn.Module, names: Sequence[str], batches: Iterable[Any], loss: Loss = model_loss
) -> dict[str, Tensor]:
    """Return the mean dL/dW [out, in] of each named layer over the batches, in fp32.

    The trainability flags that this needs for the moment are given back afterwards, and the
    parameters' own `.grad` are not touched.
    """
    weights = [cast(Tensor, model.get_submodule(n).weight) for n in names]
    before = [w.requires_grad for w in weights]
    training = model.training
    totals: list[Tensor | None] = [None] * len(names)
    n = 0
    try:
        model.eval()
        for w in weights:
            w.requires_grad_(True)
        for batch in batches:
            with torch.enable_grad():
                grads = torch.autograd.grad(loss(model, batch), weights, allow_unused=True)
            # A layer that the loss does not reach has no gradient to start from.
            if idle := [name for name, g in zip(names, grads, strict=True) if g is None]:
                raise UserError(
                    f"layer {idle[0]!r} plays no part in the loss, so a start that looks at its "
                    "gradient cannot adapt it; leave it out of targets"
                )
            totals = [
                wide(g) if t is None else t + wide(g) for t, g in zip(totals, grads, strict=True)
            ]
            n += 1
    finally:
        for w, flag in zip(weights, before, strict=True):
            w.requires_grad_(flag)
        model.train(training)
    if n == 0:
        raise UserError("data= holds no batch; a start that looks at gradients needs at least one")
    return {
        name: oriented(model.get_submodule(name), total) / n  # type: ignore[arg-type]
        for name, total in zip(names, totals, strict=True)
    }
