"""Gradients of held-out data for the upper level's tensors, plain or through a training step.

With w the lower level's tensors (all that the Rule does not hold out), α the upper level's and ξ
the learning rate, DARTS (arXiv 1806.09055, eqs. 7 and 8) gives α

    ∇_α L_held(w', α) - ∇²_{α,w} L_train(w, α) u,  w' = w - ξ ∇_w L_train,  u = ξ ∇_{w'} L_held

whose second term is the difference of two training gradients, at w ± ε u with ε = 0.01 / |u|.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loralab.core.layers import wide
from loralab.training.adamw import per_slot
from loralab.training.optimizer import Group, PackOptimizer
from loralab.training.states import BankState

RADIUS = 0.01  # |ε u|, in DARTS as well

# From tensors to their gradients of a loss that is summed over the slots.
Gradients = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]


@dataclass(frozen=True)
class _Level:
    """Tensors [K', ...], the slots of each and the rate ξ of each in those slots [K']."""

    tensors: list[Tensor]
    slots: list[list[int]]
    rates: list[Tensor]

    def add(self, tensor: Tensor, slots: list[int], rate: Tensor) -> None:
        self.tensors.append(tensor)
        self.slots.append(slots)
        self.rates.append(rate)

    def times_rate(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Return ξ times the gradients; 0 where there is none."""
        return [
            torch.zeros_like(p) if g is None else per_slot(rate, g).to(g.dtype) * g
            for p, g, rate in zip(self.tensors, gradients, self.rates, strict=True)
        ]

    @torch.no_grad()
    def put(self, origin: Sequence[Tensor], shift: Sequence[Tensor]) -> None:
        """Set every tensor to origin + shift."""
        for p, start, by in zip(self.tensors, origin, shift, strict=True):
            torch.add(start, by, out=p)


def gradients_of(losses: Callable[[], Tensor]) -> Gradients:
    """Return the gradients of a function's losses [K]."""
    return lambda tensors: torch.autograd.grad(losses().sum(), tensors, allow_unused=True)


def unrolls(optimizer: PackOptimizer, step: int) -> list[bool]:
    """Return of every slot whether this step looks at its training batch at other tensors."""
    found = [False] * optimizer.pack.size
    for group in _learning(optimizer, step):
        for slot in group.slots:
            found[slot] |= group.rule.unrolls
    return found


def look_at_held_out(
    optimizer: PackOptimizer, step: int, lr: Tensor, held_out: Gradients, training: Gradients
) -> None:
    """Replace the `.grad` of the upper level's tensors, which is that of the training data.

    A Form's own penalty on these tensors is part of the upper level's loss.

    Args:
        step: 0-based number of the step that the gradients are for.
        lr: per slot, [K], before the Schedules' own factors.
        held_out: of the losses on held-out data.
        training: of the losses on this step's training data; asked for slots that `unrolls` names.
    """
    upper, lower = _levels(optimizer, step, lr)
    if not upper.tensors:
        return
    origin = [p.detach().clone() for p in lower.tensors]
    forward = lower.times_rate([p.grad for p in lower.tensors])
    lower.put(origin, [-by for by in forward])
    found = list(held_out([*upper.tensors, *lower.tensors]))
    n = len(upper.tensors)
    direct = [_or_zero(g, p) for p, g in zip(upper.tensors, found[:n], strict=True)]
    if lower.tensors:
        u = lower.times_rate(found[n:])
        second = _mixed(upper, lower, origin, u, optimizer.pack.size, training)
        direct = [g - part for g, part in zip(direct, second, strict=True)]
    for p, g, own in zip(upper.tensors, direct, _penalties(optimizer, upper.tensors), strict=True):
        p.grad = g if own is None else g + own


def _mixed(
    upper: _Level,
    lower: _Level,
    origin: Sequence[Tensor],
    u: Sequence[Tensor],
    n_slots: int,
    training: Gradients,
) -> list[Tensor]:
    """Return ∇²_{α,w} L_train u for every upper tensor; leaves the lower level at its origin."""
    squares = upper.rates[0].new_zeros(n_slots)
    for by, slots in zip(u, lower.slots, strict=True):
        squares[slots] += wide(by).flatten(1).square().sum(1).to(squares.dtype)
    norm = squares.sqrt()
    epsilon = torch.where(norm > 0, RADIUS / norm, torch.zeros_like(norm))
    found = []
    for sign in (1, -1):
        steps = zip(u, lower.slots, strict=True)
        lower.put(origin, [sign * per_slot(epsilon[s], by).to(by.dtype) * by for by, s in steps])
        found.append(training(upper.tensors))
    lower.put(origin, [torch.zeros_like(start) for start in origin])
    return [
        (_or_zero(plus, p) - _or_zero(minus, p)) * per_slot(norm[s] / (2 * RADIUS), p).to(p.dtype)
        for p, s, plus, minus in zip(upper.tensors, upper.slots, *found, strict=True)
    ]


def _levels(optimizer: PackOptimizer, step: int, lr: Tensor) -> tuple[_Level, _Level]:
    """Return the upper level's tensors, and the lower level's of slots whose Rule unrolls."""
    learning = list(_learning(optimizer, step))
    through = unrolls(optimizer, step)
    upper, lower = _Level([], [], []), _Level([], [], [])
    for group in optimizer.groups:
        own = lr.new_tensor([float(through[k]) for k in group.slots]) * lr[group.slots]
        own = own * group.schedule.lr_factor(step, optimizer.planned(step))
        for state in group.states:
            for name, p in state.t.items():
                rate = own * group.rule.lr_ratio(name)
                if name in group.rule.held_out:
                    if group in learning:
                        upper.add(p, group.slots, rate)
                elif any(through[k] for k in group.slots):
                    lower.add(p, group.slots, rate)
    return upper, lower


def _learning(optimizer: PackOptimizer, step: int) -> Iterator[Group]:
    """Yield the groups whose upper level learns at this step."""
    for group in optimizer.groups:
        if group.rule.held_out and group.schedule.searches(step, optimizer.planned(step)):
            yield group


def _penalties(optimizer: PackOptimizer, upper: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return the gradients of the Forms' own penalties."""
    states = [s for g in optimizer.groups if g.rule.held_out for s in g.states]
    with torch.enable_grad():
        found = [s._bank.penalty() for s in states if isinstance(s, BankState)]
        terms = [value.sum() for value in found if value is not None and value.requires_grad]
        if not terms:
            return [None] * len(upper)
        return torch.autograd.grad(torch.stack(terms).sum(), upper, allow_unused=True)


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
