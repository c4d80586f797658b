"""Kinds of layer that can be adapted, seen as one frozen weight W [out, in]."""

import torch
from torch import Tensor, nn


def _is_conv1d(module: nn.Module) -> bool:
    # transformers' Conv1D, asked by name so that transformers need not be imported here.
    return any(
        c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"
        for c in type(module).__mro__
    )


def is_linear(module: nn.Module) -> bool:
    """Return whether the module is an nn.Linear or a transformers Conv1D."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def is_plain(module: nn.Module, cls: type) -> bool:
    """Return whether `cls` computes just x W^T + b, so that the base may be run without it."""
    return cls is nn.Linear or (cls.__name__ == "Conv1D" and _is_conv1d(module))


def weight_of(module: nn.Module) -> Tensor:
    """Return W as [out, in]; a view for Conv1D, which stores its transpose."""
    return oriented(module, module.weight)  # type: ignore[arg-type]


def oriented(module: nn.Module, tensor: Tensor) -> Tensor:
    """Return a tensor that has the layout of the module's weight as [out, in]."""
    return tensor.mT if _is_conv1d(module) else tensor


def stored(module: nn.Module, weight: Tensor) -> Tensor:
    """Return W [out, in] in the module's own layout."""
    return oriented(module, weight).contiguous()


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32, or in fp64 if it is: the precision of all adapter arithmetic."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
