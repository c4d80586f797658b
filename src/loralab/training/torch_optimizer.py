"""A pack's rules as a torch Optimizer, for any training loop."""

from collections.abc import Callable
from typing import Any

import torch

from loralab.core.pack import Pack
from loralab.errors import UserError
from loralab.training.optimizer import PackOptimizer


class AdapterOptimizer(torch.optim.Optimizer):
    """The method's Rule and Schedule behind `step`, `zero_grad`, `param_groups`, `state_dict`.

    Learning-rate schedulers write to `param_groups[0]["lr"]` as usual; ratios between tensors are
    the Rule's own business.
    """

    def __init__(self, pack: Pack, lr: float, weight_decay: float, n_steps: int | None) -> None:
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
        self._step = 0
        parameters = list(pack.trainable().values())
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Apply one step of the method's Rule and Schedule."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._inner.read()
        group = self.param_groups[0]
        ones = torch.ones(self._inner.pack.size, device=group["params"][0].device)
        self._inner.step(ones * group["lr"], ones * group["weight_decay"], self._step)
        self._step += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the memory of the rules under stable names, beside the usual groups."""
        return super().state_dict() | {"loralab": self._inner.tensors(), "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        if "loralab" not in state_dict:
            raise UserError("this state_dict is not one of a loralab optimizer")
        rest = {k: v for k, v in state_dict.items() if k not in ("loralab", "step")}
        super().load_state_dict(rest)
        device = self.param_groups[0]["params"][0].device
        own = {n: t.detach().clone().to(device) for n, t in state_dict["loralab"].items()}
        self._inner.load_tensors(own)
        self._step = state_dict["step"]
