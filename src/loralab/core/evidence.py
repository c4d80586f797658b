"""What data-driven starts look at: gradients of the loss, second moments of inputs and outputs."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from loralab.core.coded import coded
from loralab.core.layers import oriented, stored, vectors, weight_of, wide
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


def check_data(data: Any, loss: Any = model_loss) -> None:
    """Raise UserError unless `data` can be batches (None is none at all) and `loss` be called."""
    if isinstance(data, Mapping):
        raise UserError("data is one batch, and several are looked at; pass a list of batches")
    if data is not None and (isinstance(data, str) or not isinstance(data, Iterable)):
        raise UserError(f"data are batches, unlike {data!r}; pass a list of batches")
    if not callable(loss):
        raise UserError(f"loss is a function of (model, batch), not {loss!r}")


def measure(
    model: nn.Module,
    names: Sequence[str],
    needs: frozenset[str],
    batches: Iterable[Any],
    loss: Loss = model_loss,
) -> dict[str, dict[str, Tensor]]:
    """Return what `needs` names of each layer, as `recipe.Evidence` describes it, in one pass.

    The trainability flags that this needs for the moment are given back afterwards, and the
    parameters' own `.grad` are not touched.

    Raises:
        UserError: no batch, a loss that is no scalar or has no gradient, or a layer that plays no
            part in it.
    """
    layers = {n: model.get_submodule(n) for n in names}
    watch = _Watch(layers, needs)
    training = model.training
    totals: list[Tensor] | None = None
    n = 0
    try:
        model.eval()
        with _differentiable(list(layers.values())) as weights:
            for batch in batches:
                watch.mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                with torch.enable_grad():
                    found = torch.autograd.grad(
                        _checked(loss(model, batch)), weights, allow_unused=True
                    )
                # A layer that the loss does not reach has no gradient to start from.
                if idle := [name for name, g in zip(names, found, strict=True) if g is None]:
                    raise UserError(
                        f"layer {idle[0]!r} plays no part in the loss, so a start that looks at "
                        "its gradient or its inputs cannot adapt it; leave it out of targets"
                    )
                grads = [wide(cast(Tensor, g)) for g in found]
                totals = grads if totals is None else torch._foreach_add(totals, grads)  # type: ignore
                n += 1
    finally:
        watch.remove()
        model.train(training)
    if totals is None:
        raise UserError("data= holds no batch; a start that looks at data needs at least one")
    result = {name: watch.means(name) for name in names}
    if "gradient" in needs:
        for name, total in zip(names, totals, strict=True):
            result[name]["gradient"] = oriented(layers[name], total) / n
    return result


def _checked(loss: Any) -> Tensor:
    """Return the loss, where it is one number that a gradient can be taken of."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(f"the loss of a data batch must be a tensor of one number, not {what}")
    if not loss.requires_grad:
        raise UserError(
            "no gradient can be taken of the loss of a data batch; compute it from the model's "
            "output without torch.no_grad or detach"
        )
    return loss


@contextlib.contextmanager
def _differentiable(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Yield the layers' weights in their own layout, as leaves that require a gradient.

    A layer in codes runs on a dense copy inside, which is no larger than the gradients are.
    """
    weights, before, thawed = [], [], []
    for module in layers:
        if coded(module) is None:
            weights.append(cast(Tensor, module.weight))
        else:
            weights.append(stored(module, weight_of(module).detach()))
            module.forward = partial(_dense_forward, module, weights[-1])
            thawed.append(module)
        before.append(weights[-1].requires_grad)
        weights[-1].requires_grad_(True)
    try:
        yield weights
    finally:
        for module in thawed:
            del module.forward
        for w, flag in zip(weights, before, strict=True):
            w.requires_grad_(flag)


def _dense_forward(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    bias = cast(Tensor | None, module.bias)
    W = oriented(module, weight).to(x.dtype)
    return nn.functional.linear(x, W, None if bias is None else bias.to(x.dtype))


def weight_gradients(
    model: nn.Module, names: Sequence[str], batches: Iterable[Any], loss: Loss = model_loss
) -> dict[str, Tensor]:
    """Return the mean dL/dW [out, in] of each named layer over the batches, in fp32."""
    found = measure(model, names, frozenset({"gradient"}), batches, loss)
    return {name: evidence["gradient"] for name, evidence in found.items()}


class _Watch:
    """Sums x x^T and g g^T of layers' inputs and output gradients while batches pass through."""

    def __init__(self, layers: Mapping[str, nn.Module], needs: frozenset[str]) -> None:
        self.mask: Tensor | None = None
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.counts: dict[tuple[str, str], int] = {}
        self.handles = []
        if needs & {"covariance", "gradient_covariance"}:
            for name, module in layers.items():
                self.handles.append(module.register_forward_hook(self._hook(name, needs)))

    def remove(self) -> None:
        """Take the hooks off the layers."""
        for handle in self.handles:
            handle.remove()

    def means(self, name: str) -> dict[str, Tensor]:
        """Return the mean products by the name of the evidence."""
        return {
            what: total / self.counts[at, what]
            for (at, what), total in self.sums.items()
            if at == name
        }

    def _hook(self, name: str, needs: frozenset[str]) -> Callable[..., None]:
        def seen(module: nn.Module, args: Any, output: Tensor) -> None:
            if "covariance" in needs:
                x = vectors(module, args[0].detach())
                if not x.is_floating_point():
                    x = nn.functional.one_hot(x, weight_of(module).shape[1])
                self._add(name, "covariance", x)
            if "gradient_covariance" in needs:
                output.register_hook(lambda g: took(module, g.detach()))

        def took(module: nn.Module, g: Tensor) -> None:
            if isinstance(module, nn.Conv2d):
                g = g.flatten(2).mT
            # The loss is a mean over tokens; times their number it is each token's own gradient.
            g = self._valid(g)
            self._add(name, "gradient_covariance", g * len(g))

        return seen

    def _valid(self, x: Tensor) -> Tensor:
        """Return the vectors [n, d] of real tokens."""
        if self.mask is not None and x.dim() == 3 and self.mask.shape == x.shape[:2]:
            return x[self.mask.bool()]
        return x.reshape(-1, x.shape[-1])

    def _add(self, name: str, what: str, x: Tensor) -> None:
        x = wide(self._valid(x))
        product = x.mT @ x
        key = (name, what)
        self.sums[key] = self.sums[key] + product if key in self.sums else product
        self.counts[key] = self.counts.get(key, 0) + len(x)
