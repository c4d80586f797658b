"""Gradients of held-out data for the upper level's tensors, plain or through a training step.

With w the lower level's tensors (all that the Rule does not hold out), α the upper level's and ξ
the learning rate, DARTS (arXiv 1806.09055, eqs. 7 and 8) gives α

    ∇_α L_held(w', α) - ∇²_{α,w} L_train(w, α) u,  w' = w - ξ ∇_w L_train,  u = ξ ∇_{w'} L_held

whose second term is the difference of two training gradients, at w ± ε u with ε = 0.01 / |u|.
"""

import contextlib
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
    """Tensors [K', ...] of the lower level, the slots of each and its rates ξ there [K'].

    A rate is 0 where the slot takes the plain gradient.
    """

    tensors: list[Tensor]
    slots: list[list[int]]
    rates: list[Tensor]

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

    @contextlib.contextmanager
    def movable(self) -> Iterator[list[Tensor]]:
        """Give copies of the tensors, to which they come back whatever happens."""
        origin = [p.detach().clone() for p in self.tensors]
        try:
            yield origin
        finally:
            with torch.no_grad():
                for p, start in zip(self.tensors, origin, strict=True):
                    p.copy_(start)


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
    learning = list(_learning(optimizer, step))
    if not learning:
        return
    upper = [
        (p, group.slots)
        for group in learning
        for state in group.states
        for name, p in state.t.items()
        if name in group.rule.held_out
    ]
    above, lower = [p for p, _ in upper], _lower_level(optimizer, step, lr)
    with lower.movable() as origin:
        lower.put(origin, [-by for by in lower.times_rate([p.grad for p in lower.tensors])])
        found = list(held_out([*above, *lower.tensors]))
        total = [_or_zero(g, p) for p, g in zip(above, found[: len(above)], strict=True)]
        if lower.tensors:
            u = lower.times_rate(found[len(above) :])
            second = _mixed(upper, lower, origin, u, torch.zeros_like(lr), training)
            total = [g - part for g, part in zip(total, second, strict=True)]
    for p, g, own in zip(above, total, _penalties(optimizer, above), strict=True):
        p.grad = g if own is None else g + own


def _mixed(
    upper: Sequence[tuple[Tensor, list[int]]],
    lower: _Level,
    origin: Sequence[Tensor],
    u: Sequence[Tensor],
    squares: Tensor,
    training: Gradients,
) -> list[Tensor]:
    """Return ∇²_{α,w} L_train u for every upper tensor; `squares` is a zero per slot."""
    for by, slots in zip(u, lower.slots, strict=True):
        squares[slots] += wide(by).flatten(1).square().sum(1).to(squares.dtype)
    norm = squares.sqrt()
    epsilon = torch.where(norm > 0, RADIUS / norm, 0.0)
    cuda = [squares.device] if squares.is_cuda else []
    above, found = [p for p, _ in upper], []
    for sign in (1, -1):
        steps = zip(u, lower.slots, strict=True)
        lower.put(origin, [sign * per_slot(epsilon[s], by).to(by.dtype) * by for by, s in steps])
        # Both draw the same dropout, or the difference would be that of two masks.
        with torch.random.fork_rng(cuda, enabled=sign == 1):
            found.append(training(above))
    return [
        (_or_zero(plus, p) - _or_zero(minus, p)) * per_slot(norm[s] / (2 * RADIUS), p).to(p.dtype)
        for (p, s), plus, minus in zip(upper, *found, strict=True)
    ]


def _lower_level(optimizer: PackOptimizer, step: int, lr: Tensor) -> _Level:
    """Return the tensors of the lower level in slots whose Rule unrolls."""
    through, found = unrolls(optimizer, step), _Level([], [], [])
    for group in optimizer.groups:
        mask = [float(through[k]) for k in group.slots]
        if not any(mask):
            continue
        own = lr.new_tensor(mask) * lr[group.slots]
        own = own * group.schedule.lr_factor(step, optimizer.planned(step))
        for state in group.states:
            for name, p in state.t.items():
                if name not in group.rule.held_out:
                    found.tensors.append(p)
                    found.slots.append(group.slots)
                    found.rates.append(own * group.rule.lr_ratio(name))
    return found


def _learning(optimizer: PackOptimizer, step: int) -> Iterator[Group]:
    """Yield the groups whose upper level learns at this step."""
    for group in optimizer.groups:
        if group.rule.held_out and group.schedule.searches(step, optimizer.planned(step)):
            yield group


def _penalties(optimizer: PackOptimizer, upper: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return the gradients of the Forms' own penalties, where the training loop asks for these."""
    if not optimizer.pack.asked_penalty:
        return [None] * len(upper)
    states = [s for g in optimizer.groups if g.rule.held_out for s in g.states]
    with torch.enable_grad():
        found = [s._bank.penalty() for s in states if isinstance(s, BankState)]
        terms = [value.sum() for value in found if value is not None and value.requires_grad]
        if not terms:
            return [None] * len(upper)
        return torch.autograd.grad(torch.stack(terms).sum(), upper, allow_unused=True)


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
