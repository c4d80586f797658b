"""What one adapted layer of a method owns and keeps, measured on a real pack, not declared."""

import functools
from dataclasses import dataclass
from typing import Any

# Sizes whose halves, quarters and eighths are all different, so that a size says where it is from.
D_OUT, D_IN, RANK = 240, 336, 8
TOKENS = 1024  # the sequence length at which arXiv 2601.22708 measures memory
_NAMES = {
    **{size // k: f"{name}/{k}" for name, size in (("m", D_OUT), ("n", D_IN)) for k in (8, 4, 2)},
    **{RANK // 2: "r/2", RANK * 3 // 2: "3r/2"},
    **{RANK * k: f"{k}r" for k in (2, 3, 4)},
    D_OUT: "m",
    D_IN: "n",
    RANK: "r",
}


@dataclass(frozen=True)
class Cost:
    """One layer W [m, n] = [240, 336] at rank r = 8.

    Args:
        trained: {tensor: shape}, with m, n, r for the sizes.
        frozen: the same for tensors that are kept but not trained.
        n_trained: trained numbers.
        n_frozen: frozen numbers beside W, anchors of the start included.
    """

    trained: dict[str, str]
    frozen: dict[str, str]
    n_trained: int
    n_frozen: int


@functools.cache
def measure(recipe: Any) -> Cost:
    """Return the cost of a recipe on the sample layer."""
    _, pack = _sample(recipe)
    _, bank = next(iter(pack.banks()))
    kept = [name for name in bank.names if name not in bank.trained]
    buffers = sum(buffer[0].numel() for name, buffer in bank.named_buffers() if buffer.dim() > 1)
    return Cost(
        trained={name: shape_text(getattr(bank, name)) for name in bank.trained},
        frozen={name: shape_text(getattr(bank, name)) for name in kept},
        n_trained=pack.count_parameters()[0],
        n_frozen=sum(getattr(bank, name)[0].numel() for name in kept) + buffers,
    )


@functools.cache
def memory(recipe: Any) -> int:
    """Return the bytes that training the sample layer holds beside W, in fp32.

    They are the method's own tensors, their gradients, the rule's memory after a step, and what
    the forward pass of 1024 tokens keeps for backward, the layer's input included.
    """
    import torch
    from torch.autograd.graph import saved_tensors_hooks

    from loralab.seeds import generator
    from loralab.training.optimizer import PackOptimizer

    model, pack = _sample(recipe)
    x = torch.randn(1, TOKENS, D_IN, generator=generator("tokens"))
    base = {p.untyped_storage().data_ptr() for p in model.parameters()}
    owned = {t.untyped_storage().data_ptr(): _bytes(t) for t in _tensors(pack)}
    saved: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        place = tensor.untyped_storage().data_ptr()
        if place not in base and place not in owned:
            saved[place] = _bytes(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    y.square().mean().backward()
    gradients = sum(_bytes(p.grad) for p in pack.parameters() if p.grad is not None)
    optimizer = PackOptimizer(pack, n_steps=100)
    optimizer.read()
    with torch.no_grad():
        optimizer.step(torch.full((1,), 1e-3), torch.zeros(1), 0)
    state = sum(_bytes(t) for t in optimizer.tensors().values())
    return sum(owned.values()) + gradients + state + sum(saved.values())


def _sample(recipe: Any) -> tuple[Any, Any]:
    """Return the sample layer as a model, and a pack of one on it."""
    import torch

    from loralab.core.pack import Pack, SlotSpec
    from loralab.seeds import generator

    weight = torch.randn(D_OUT, D_IN, generator=generator("cost")) / D_IN**0.5
    layer = torch.nn.Linear(D_IN, D_OUT, bias=False)
    layer.weight.data.copy_(weight)
    model = torch.nn.Sequential(layer)
    pack = Pack(
        model,
        [SlotSpec(recipe, RANK, targets=("0",))],
        source=lambda names, needs: dict.fromkeys(names, _evidence(weight)),
    )
    return model, pack


def _evidence(weight: Any) -> dict[str, Any]:
    """Return some gradient and some covariances; the shapes hardly depend on them."""
    G = weight.flip(0)
    return {"gradient": G, "covariance": G.mT @ G, "gradient_covariance": G @ G.mT}


def _tensors(pack: Any) -> list[Any]:
    return [*pack.parameters(), *(b for b in pack.buffers() if b is not None)]


def _bytes(tensor: Any) -> int:
    """Return the size of the storage behind a tensor: a view keeps all of it."""
    return int(tensor.untyped_storage().nbytes())


def shape_text(tensor: Any) -> str:
    """Return the shape behind the pack axis in words of m, n, r: "[r, n]"."""
    return "[" + ", ".join(_NAMES.get(size, str(size)) for size in tensor.shape[1:]) + "]"
