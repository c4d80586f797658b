"""Blocks that run once for every expert that a token visits (Forms with `route`)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralab.core.layout import EXPERT, Layout
from loralab.core.sites import LinearSite, base_forward
from loralab.errors import UserError
from loralab.recipe import Site

Visits = tuple[Tensor, Tensor]  # which expert, and with what weight: [V, rows, ...] each


class RoutedBlock(nn.Module):
    """A module that holds several adapted layers; for each slot the first of them routes its input.

    Inside, a slot that routes has V rows for each of its own, visit by visit.

    Args:
        leads: the sites with a bank that routes.

    Raises:
        UserError: the module holds layers that are none of the experts' (attention, say).
    """

    def __init__(
        self, name: str, module: nn.Module, layout: Layout, leads: Sequence[LinearSite]
    ) -> None:
        super().__init__()
        self.name, self.layout = name, layout
        self._leads = list(leads)  # in a list: they are the children of their own layers
        form = next(bank.form for lead in leads for bank in lead.banks if bank.routes)
        for inside, _ in module.named_modules():
            if inside and not form.routes(Site(f"{name}.{inside}", 0, 0, 0)):
                raise UserError(
                    f"{type(form).__name__} sends tokens to experts that are whole blocks, and "
                    f"{name!r} also holds {inside!r}; adapt only one of its other layers"
                )

    def forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return the block's output [rows, ..., out] for x [rows, ..., in], slot-major.

        Raises:
            UserError: the block takes or gives more than one tensor.
        """
        routing = [
            (lo, bank)
            for lead in self._leads
            for lo, bank in zip(lead.first, lead.banks, strict=True)
            if bank.routes
        ]
        if self.layout.disabled or not routing:
            return base_forward(module, *args, **kwargs)
        inputs = [*args, *kwargs.values()]
        if len(inputs) != 1:
            raise self._mistake(f"takes {len(inputs)} inputs")
        (x,) = inputs
        rows = self.layout.rows_of(x.shape[0])
        visits: list[Visits | None] = [None] * len(rows)  # None for slots that do not route
        parts = x.split(rows)
        for lo, bank in routing:
            for k in range(bank.size):
                visits[lo + k] = bank.route(parts[lo + k], k)
        times = [1 if v is None else len(v[0]) for v in visits]
        inside = [r * n for r, n in zip(rows, times, strict=True)]
        before = self.layout.given
        self.layout.given = {
            name: _repeated(value, rows, times) if len(value) == len(x) else value
            for name, value in self.layout.handed().items()
        } | {EXPERT: self._experts(x, rows, visits)}
        try:
            with self.layout.using(inside):
                y = base_forward(module, _repeated(x, rows, times))
        finally:
            self.layout.given = before
        if not isinstance(y, Tensor):
            raise self._mistake("gives more than one tensor")
        results = zip(y.split(inside), visits, strict=True)
        return torch.cat([part if v is None else _mixed(part, v[1]) for part, v in results])

    @staticmethod
    def _experts(x: Tensor, rows: Sequence[int], visits: Sequence[Visits | None]) -> Tensor:
        """Return the expert of every row inside; slots that do not route have 0, unread."""
        unread = [torch.zeros(r, *x.shape[1:-1], dtype=torch.long, device=x.device) for r in rows]
        pairs = zip(unread, visits, strict=True)
        return torch.cat([none if v is None else v[0].flatten(0, 1) for none, v in pairs])

    def _mistake(self, what: str) -> UserError:
        return UserError(
            f"block {self.name!r} {what}, so its tokens cannot be sent to experts as wholes; "
            "choose targets outside it"
        )


def _repeated(value: Tensor, rows: Sequence[int], times: Sequence[int]) -> Tensor:
    """Return value [rows, ...] with every slot's rows as often as `times` says."""
    parts = zip(value.split(list(rows)), times, strict=True)
    return torch.cat([part.repeat(n, *(1,) * (part.dim() - 1)) for part, n in parts])


def _mixed(y: Tensor, weight: Tensor) -> Tensor:
    """Return Σ_v weight_v y_v for y [V rows, ..., out] and weights [V, rows, ...] of sum 1."""
    first, *others = y.unflatten(0, (len(weight), -1))
    shares = weight[1:, ..., None].to(y.dtype)
    # Exactly y where all visits give the same, as at step 0.
    return first + sum(w * (y_v - first) for w, y_v in zip(shares, others, strict=True))
