"""A pack's rules as a torch Optimizer, for any training loop."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from loralab.core.pack import Pack
from loralab.errors import UserError
from loralab.training.optimizer import PackOptimizer
from loralab.training.two_level import gradients_of, look_at_held_out, unrolls


class AdapterOptimizer(torch.optim.Optimizer):
    """The method's Rule and Schedule behind `step`, `zero_grad`, `param_groups`, `state_dict`.

    Learning-rate schedulers write to `param_groups[0]["lr"]` as usual; ratios between tensors are
    the Rule's own business.

    Args:
        held_out: returns the present model's loss on held-out data; see `Adapter.optimizer`.
    """

    def __init__(
        self,
        pack: Pack,
        lr: float,
        weight_decay: float,
        n_steps: int | None,
        held_out: Callable[[], Tensor] | None = None,
    ) -> None:
        for what, number in (("the learning rate", lr), ("weight_decay", weight_decay)):
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise UserError(f"{what} must be a number, not {number!r}")
        if not 0 < lr < float("inf"):
            raise UserError(f"the learning rate must be positive, not {lr}")
        if not 0 <= weight_decay < float("inf"):
            raise UserError(f"weight_decay must not be negative, not {weight_decay}")
        if n_steps is not None and not (isinstance(n_steps, int) and n_steps >= 1):
            raise UserError(f"n_steps counts the planned steps, so it is not {n_steps!r}")
        self._inner = PackOptimizer(pack, n_steps)
        if held_out is None and self._inner.needs_held_out:
            raise UserError(
                f"{_who(pack)} looks at held-out data; pass held_out=, a function that returns the "
                "model's loss on a batch that it is not trained on"
            )
        if held_out is not None and not callable(held_out):
            raise UserError(
                "held_out is a function that returns the model's loss on held-out data, not a "
                f"{type(held_out).__name__}"
            )
        self._held_out = held_out
        if held_out is not None:
            self._inner.hold_out(lambda: self._held_out_loss().view(1))
        self._resizes = any(slot.recipe.schedule.resizes for slot in pack.slots)
        self._step = 0
        parameters = list(pack.trainable().values())
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Apply one step of the method's Rule and Schedule."""
        loss, pack = None, self._inner.pack
        if not pack.attached:
            raise UserError("the adapter is merged or removed, so nothing of it can be trained")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._step == 0 and pack.has_penalty and not pack.asked_penalty:
            warnings.warn(
                "the method has a loss of its own, which adapter.penalty() returns after each "
                "forward pass; add it to the training loss, or it plays no part",
                stacklevel=3,  # past torch.no_grad
            )
        group = self.param_groups[0]
        ones = torch.ones(self._inner.pack.size, device=group["params"][0].device)
        lr = ones * group["lr"]
        self._look_at_held_out(lr, closure)
        self._inner.read()
        self._inner.step(lr, ones * group["weight_decay"], self._step)
        self._step += 1
        if self._resizes:  # then the tensors are other ones now
            group["params"] = list(self._inner.pack.trainable().values())
        return loss

    def _look_at_held_out(self, lr: Tensor, closure: Callable[[], Any] | None) -> None:
        """Give the upper level's tensors the gradient of the held-out loss."""
        inner, step = self._inner, self._step
        if closure is None and any(unrolls(inner, step)):
            raise UserError(
                f"{_who(inner.pack)} takes its gradient through a step on the training data and "
                "needs the training loss again: call optimizer.step(closure), where closure clears "
                "the gradients, calls backward on the loss and returns it; it runs three times, on "
                "the same batch; or adapt with order='first' for the first-order gradient"
            )
        parameters = list(inner.pack.trainable().values())

        def training(tensors: Sequence[Tensor]) -> list[Tensor | None]:
            assert closure is not None
            before = [p.grad for p in parameters]
            try:
                inner.zero_grad()
                with torch.enable_grad():
                    closure()
                if all(p.grad is None for p in parameters):
                    raise UserError(
                        "the closure gave no trained tensor a gradient; in it, clear the "
                        "gradients, compute the loss anew and call backward on it"
                    )
                return [p.grad for p in tensors]
            finally:
                for p, grad in zip(parameters, before, strict=True):
                    p.grad = grad

        held_out = gradients_of(self._differentiable_loss)
        with torch.enable_grad():
            look_at_held_out(inner, step, lr, held_out, training)

    def _held_out_loss(self) -> Tensor:
        assert self._held_out is not None
        loss = self._held_out()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(f"held_out must return a loss, a tensor of one number, not {shape}")
        return loss.view(())

    def _differentiable_loss(self) -> Tensor:
        loss = self._held_out_loss()
        if not loss.requires_grad:
            raise UserError(
                "held_out returned a loss that no gradient can be taken of; compute it with the "
                "adapted model, without torch.no_grad, detach or item"
            )
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the memory of the rules under stable names, beside the usual groups."""
        own = {"loralab": self._inner.tensors(), "step": self._step, "of": _trains(self._inner)}
        return super().state_dict() | own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` gave.

        Raises:
            UserError: it is of another optimizer, or of an adapter of another method or rank.
        """
        if "loralab" not in state_dict:
            raise UserError("this state_dict is not one of a loralab optimizer")
        here = _trains(self._inner)
        saved = state_dict.get("of", here)
        if saved != here:
            what = next(k for k in [*here, *saved] if saved.get(k) != here.get(k))
            raise UserError(
                f"this state_dict is of another adapter: its {what} is {saved.get(what)}, here it "
                f"is {here.get(what)}; load it for the same method and rank"
            )
        rest = {k: v for k, v in state_dict.items() if k not in ("loralab", "step", "of")}
        super().load_state_dict(rest)
        device = self.param_groups[0]["params"][0].device
        own = {n: t.detach().clone().to(device) for n, t in state_dict["loralab"].items()}
        self._inner.load_tensors(own)
        self._step = state_dict["step"]


def _trains(inner: PackOptimizer) -> dict[str, Any]:
    """Return what the memory belongs to: rules, schedules and the shape of every trained tensor."""
    groups = inner.groups
    pieces = {
        "rule": [type(g.rule).__name__ for g in groups],
        "schedule": [type(g.schedule).__name__ for g in groups],
    }
    return pieces | {n: list(p.shape) for n, p in inner.pack.trainable().items()}


def _who(pack: Pack) -> str:
    """Return the name of the piece that looks at held-out data."""
    recipe = pack.slots[0].recipe
    return type(recipe.rule if recipe.rule.held_out else recipe.schedule).__name__
