"""`loralab.quantize`: a frozen base in 4 or 8 bits, under any method."""

from collections.abc import Sequence

from torch import nn

from loralab.core.coded import CodedLinear, coded
from loralab.core.layers import is_plain, weight_of, wide
from loralab.core.pack import check_free
from loralab.core.quantize import quantize as to_codes
from loralab.core.targets import beside_head, resolve_targets
from loralab.errors import UserError, near_misses

BITS = {"nf4": 4, "int8": 8}


def quantize(
    model: nn.Module,
    code: str = "nf4",
    targets: str | Sequence[str] = "all-linear",
    *,
    block: int = 64,
) -> nn.Module:
    """Keep the weights of a model's linear layers as small integers; return the model.

    QLoRA (arXiv 2305.14314) is any method on an NF4 base; its second quantisation, of the scales,
    is left out. Layers stay the same modules and become `CodedLinear`; biases stay as they are.
    With fp32 scales a weight takes 4.5 bits ("nf4", blocks of 64) or little more than 8 ("int8").

    Args:
        code: "nf4" (16 levels in blocks) or "int8" (one scale per output).
        targets: as `loralab.adapt` takes them; "all-linear" leaves out the output head.
        block: entries that share a scale in "nf4", even.

    Raises:
        UserError: unknown code, an odd block, targets that are no plain linear layer, or a model
            that carries an adapter.

    Example:
        >>> import torch, loralab
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh())
        >>> adapter = loralab.adapt(loralab.quantize(model, "nf4"), "lora", rank=8)  # QLoRA
        >>> model[0].codes.shape
        torch.Size([64, 32])
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"quantize takes an nn.Module, not {model!r}")
    if code not in list(BITS):
        hint = near_misses(code, list(BITS)) or f"; one of {', '.join(BITS)}"
        raise UserError(f"unknown code {code!r} for a base's weights{hint}")
    if block < 2 or block % 2:
        raise UserError(f"block must be an even number of at least 2, not {block!r}")
    check_free(model)
    names = resolve_targets(model, targets)
    if targets == "all-linear":
        # `resolve_targets` keeps the head where there is no other layer.
        names = beside_head(model, names)
        if not names:
            raise UserError("the model has no linear layer beside its head; name it in targets")
    for name in names:
        module = model.get_submodule(name)
        if coded(module) is not None:
            raise UserError(f"layer {name!r} is quantised already; load the model anew")
        if not is_plain(module, type(module)):
            raise UserError(
                f"layer {name!r} is a {type(module).__name__}, and only nn.Linear and Conv1D "
                "layers can be quantised; leave it out of targets"
            )
    for name in names:
        _encode(model.get_submodule(name), BITS[code], block)
    return model


def _encode(module: nn.Module, bits: int, block: int) -> None:
    """Put codes in place of one layer's weight; the module stays the same object."""
    W = weight_of(module).detach()
    codes, absmax = to_codes(wide(W), bits, block)
    plain = type(module)
    module.__class__ = CodedLinear
    assert isinstance(module, CodedLinear)
    module.plain, module.size, module.compute_dtype = plain, (W.shape[0], W.shape[1]), W.dtype
    del module._parameters["weight"]
    module.register_buffer("codes", codes)
    module.register_buffer("absmax", absmax)
