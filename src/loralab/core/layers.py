"""Kinds of layer that can be adapted, seen as one frozen weight W [out, in]."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loralab.core.coded import Coded, CodedLinear, coded

Weight = Tensor | Coded  # a frozen W [out, in] as banks take it


def _is_conv1d(module: nn.Module) -> bool:
    # transformers' Conv1D, asked by name so that transformers need not be imported here.
    return any(
        c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"
        for c in type(module).__mro__
    )


def layer_kind(module: nn.Module) -> str | None:
    """Return "Linear", "Conv1D" (transformers'), "Conv2d" or "Embedding"; None for other modules.

    Grouped and non-zero-padded convolutions and embeddings with `max_norm`, which write their own
    weights, are no matrix that an update could be added to.
    """
    if isinstance(module, nn.Linear):
        return "Linear"
    if isinstance(module, CodedLinear):
        return "Linear" if module.plain is nn.Linear else "Conv1D"
    if _is_conv1d(module):
        return "Conv1D"
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and module.padding_mode == "zeros"
        return "Conv2d" if plain and not isinstance(module.padding, str) else None
    if isinstance(module, nn.Embedding):
        return "Embedding" if module.max_norm is None else None
    return None


def is_linear(module: nn.Module) -> bool:
    """Return whether the module is an nn.Linear or a transformers Conv1D."""
    return layer_kind(module) in ("Linear", "Conv1D")


def is_plain(module: nn.Module, cls: type) -> bool:
    """Return whether `cls` computes just x W^T + b, so that the base may be run without it."""
    return cls is nn.Linear or (cls.__name__ == "Conv1D" and _is_conv1d(module))


def weight_of(module: nn.Module) -> Tensor:
    """Return W as [out, in]: a view of the module's own weight, however that is laid out.

    Of a layer in codes it is made anew.
    """
    found = frozen_weight(module)
    return found if isinstance(found, Tensor) else found.read()


def frozen_weight(module: nn.Module) -> Weight:
    """Return W [out, in] as the module holds it: the tensor, or the codes that it is made of."""
    found = coded(module)
    return oriented(module, module.weight) if found is None else found  # type: ignore[arg-type]


def bias_of(module: nn.Module) -> Tensor | None:
    """Return the layer's bias [out], or None where it adds none."""
    return getattr(module, "bias", None)


def read(weight: Weight) -> Tensor:
    """Return W [out, in]."""
    return weight if isinstance(weight, Tensor) else weight.read()


def product(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias in x's dtype."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight.to(x.dtype), bias)
    return weight.linear(x, bias)


def oriented(module: nn.Module, tensor: Tensor) -> Tensor:
    """Return a tensor that has the layout of the module's weight as [out, in]."""
    if isinstance(module, nn.Conv2d):
        return tensor.flatten(1)
    return tensor.mT if layer_kind(module) in ("Embedding", "Conv1D") else tensor


def stored(module: nn.Module, weight: Tensor) -> Tensor:
    """Return W [out, in] in the module's own layout."""
    if isinstance(module, nn.Conv2d):
        return weight.reshape(module.weight.shape)
    return oriented(module, weight).contiguous()


def vectors(module: nn.Module, x: Tensor) -> Tensor:
    """Return a layer's input as the vectors [..., in] that W multiplies; an Embedding's as indices.

    A Conv2d's are its unfolded patches, [rows, places, in].
    """
    if not isinstance(module, nn.Conv2d):
        return x
    size = cast(tuple[int, int], module.kernel_size)
    if size == (1, 1) and module.stride == (1, 1) and module.padding == (0, 0):
        return x.flatten(2).mT
    padding = cast(tuple[int, int], module.padding)
    return F.unfold(x, size, module.dilation, padding, module.stride).mT


def from_vectors(module: nn.Module, y: Tensor, like: Tensor) -> Tensor:
    """Return outputs [n, out] in the shape of the layer's own output `like`."""
    if isinstance(module, nn.Conv2d):
        rows, out, *places = like.shape
        z = y.view(rows, *places, out).movedim(-1, 1)
        # In the base's own memory format: the next convolution rounds differently in another.
        return z.contiguous() if like.is_contiguous() else z
    return y.view(like.shape)


def to_vectors(module: nn.Module, y: Tensor) -> Tensor:
    """Return the layer's own output as [n, out]."""
    if isinstance(module, nn.Conv2d):
        return y.flatten(2).mT.reshape(-1, y.shape[1])
    return y.reshape(-1, y.shape[-1])


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32, or in fp64 if it is: the precision of all adapter arithmetic."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
