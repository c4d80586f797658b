"""The Rules and Schedules of a pack, applied; and the torch Optimizer of a single adapter."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loralab.core.layers import wide
from loralab.core.pack import Pack
from loralab.errors import UserError
from loralab.recipe import Hyper, NoSchedule, Rule, Schedule, SiteState
from loralab.training.adamw import AdamW, per_slot
from loralab.training.states import BankState, WholeState


class Group:
    """Sites whose slots lo to hi share a Rule and a Schedule: one call steps them all."""

    def __init__(self, rule: Rule, schedule: Schedule, slots: Sequence[int]) -> None:
        self.rule, self.schedule, self.slots = rule, schedule, list(slots)
        self.states: list[SiteState] = []
        self.memory: set[str] = set()  # names of the Rule's own tensors; the rest is the Schedule's

    def step(self, hyper: Hyper) -> None:
        """Apply the Rule and note what it keeps in memory."""
        before = [set(state.state) for state in self.states]
        self.rule.step(self.states, hyper)
        for old, state in zip(before, self.states, strict=True):
            self.memory |= state.state.keys() - old

    def next_task(self, count: int) -> None:
        """Let the Schedule act between two tasks, then empty the Rule's memory."""
        self.schedule.next_task(self.states, count)
        for state in self.states:
            for name in self.memory & state.state.keys():
                del state.state[name]
        self.memory.clear()


class PackOptimizer:
    """Steps every slot of a pack with its own learning rate, decay and clipping.

    Args:
        n_steps: planned optimizer steps, which Schedules need; None where they are not known.
    """

    def __init__(self, pack: Pack, n_steps: int | None = None) -> None:
        self.pack, self.n_steps = pack, n_steps
        self.groups = _groups(pack)
        if n_steps is None:
            for group in self.groups:
                if not isinstance(group.schedule, NoSchedule):
                    raise UserError(
                        f"{type(group.schedule).__name__} plans over the whole run; pass n_steps="
                    )

    def planned(self, step: int) -> int:
        """Return the planned steps, at least those up to 0-based `step`."""
        return self.n_steps if self.n_steps is not None else step + 1

    def read(self) -> None:
        """Take the parameters' gradients, zeros where there is none."""
        for group in self.groups:
            for state in group.states:
                state.g = {
                    n: p.grad if p.grad is not None else torch.zeros_like(p)
                    for n, p in state.t.items()
                }

    @torch.no_grad()
    def collect(self) -> tuple[Tensor, Tensor]:
        """Read the gradients; return their norm per slot [K] and the largest entry |theta| [K].

        What a Schedule has folded or written into frozen tensors counts as well.
        """
        self.read()
        device = next(iter(self.pack.trainable().values())).device
        squares = torch.zeros(self.pack.size, device=device)
        largest = torch.zeros(self.pack.size, device=device)
        for group in self.groups:
            norms, tops = [], []
            for state in group.states:
                for n, p in state.t.items():
                    norms.append(torch.linalg.vector_norm(wide(state.g[n]).flatten(1), dim=1))
                    tops.append(p.flatten(1).abs().amax(1).float())
                tops += [v.flatten(1).abs().amax(1).float() for v in _written(state)]
            if norms:
                index = torch.tensor(group.slots, device=device)
                squares[index] += torch.stack(norms).square().sum(0).float()
                largest[index] = torch.maximum(largest[index], torch.stack(tops).amax(0))
        return squares.sqrt(), largest

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply slot k's gradients by factor[k]; a factor of 0 also clears NaN."""
        for group in self.groups:
            own = factor[group.slots]
            gradients = [g for state in group.states for g in state.g.values()]
            if bool((own == 1).all()) or not gradients:
                continue
            torch._foreach_mul_(gradients, [per_slot(own, g).to(g.dtype) for g in gradients])
            cleared = own == 0
            if bool(cleared.any()):
                for g in gradients:
                    g[cleared] = 0

    @torch.no_grad()
    def step(self, lr: Tensor, weight_decay: Tensor, step: int) -> None:
        """Apply one step of every Rule, then let the Schedules act.

        Args:
            lr, weight_decay: per slot, [K]; lr before the Schedules' own factors.
            step: 0-based number of this step.
        """
        total = self.planned(step)
        for group in self.groups:
            group.schedule.before_step(group.states, step, total)
            rate = lr[group.slots] * group.schedule.lr_factor(step, total)
            group.step(Hyper(rate, weight_decay[group.slots]))
            group.schedule.after_step(group.states, step, total)

    @torch.no_grad()
    def next_task(self, count: int) -> None:
        """Get ready for task number `count` (1 is the second) of a sequence."""
        for group in self.groups:
            group.next_task(count)

    def hold_out(self, losses: Callable[[], Tensor]) -> None:
        """Let Schedules ask for every slot's loss [K] on held-out data."""
        for group in self.groups:
            for state in group.states:
                if isinstance(state, BankState):
                    state._held_out = losses

    @property
    def needs_held_out(self) -> bool:
        """Return whether a Rule or a Schedule of the pack looks at held-out data."""
        return any(g.rule.held_out or g.schedule.held_out for g in self.groups)

    def ranks(self) -> dict[int, dict[str, int]]:
        """Return the ranks in use by slot and site, of slots whose Schedule or Start has a say."""
        chosen = {k: dict(spec.site_ranks) for k, spec in enumerate(self.pack.slots)}
        found = {k: ranks for k, ranks in chosen.items() if ranks}
        for group in self.groups:
            for state, ranks in zip(
                group.states, group.schedule.ranks(group.states) or (), strict=False
            ):
                for slot, rank in zip(group.slots, ranks.tolist(), strict=True):
                    found.setdefault(slot, {})[state.site.name] = int(rank)
        return found

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for p in self.pack.parameters():
            p.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Return every memory tensor by a stable name, for checkpoints."""
        return {
            f"{i}/{j}/{name}": tensor
            for i, group in enumerate(self.groups)
            for j, state in enumerate(group.states)
            for name, tensor in state.state.items()
        }

    def load_tensors(self, saved: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        for key, tensor in saved.items():
            i, j, name = key.split("/", 2)
            self.groups[int(i)].states[int(j)].state[name] = tensor

    def keep(self, slots: Sequence[int]) -> None:
        """Follow `pack.keep(slots)`: keep the memory of these slots only."""
        new = {k: i for i, k in enumerate(slots)}
        for group in self.groups:
            own = [i for i, k in enumerate(group.slots) if k in new]
            group.slots = [new[group.slots[i]] for i in own]
            for state in group.states:
                state.state = {n: v[own] for n, v in state.state.items()}
                if isinstance(state, BankState):
                    state.first = group.slots[0] if own else 0
        self.groups = [g for g in self.groups if g.slots]


def _written(state: SiteState) -> list[Tensor]:
    """Return the frozen tensors [K, ...] that the site's Schedule may have written."""
    if not isinstance(state, BankState) or isinstance(state._bank.schedule, NoSchedule):
        return []
    past = [v for v in (state._bank.past_B, state._bank.past_A) if v is not None]
    own = [v for v in state.fixed.values() if v.is_floating_point()]
    return [v for v in (*past, *own) if v[0].numel()]


def _groups(pack: Pack) -> list[Group]:
    groups: dict[tuple, Group] = {}
    key: tuple
    first_of: dict[int, str] = {}  # the site that steps a tensor
    for name, site in zip(pack.names, pack.sites, strict=True):
        for lo, bank in zip(site.first, site.banks, strict=True):
            key = (lo, bank.size, bank.rule, bank.schedule)
            if key not in groups:
                groups[key] = Group(bank.rule, bank.schedule, range(lo, lo + bank.size))
            own = [
                n for n in bank.trained if first_of.setdefault(id(getattr(bank, n)), name) == name
            ]
            groups[key].states.append(BankState(bank, pack, name, lo, own))
    for name, whole in zip(pack.whole_names, pack.whole, strict=True):
        key = ("whole", *whole.slots)
        if key not in groups:
            groups[key] = Group(AdamW(), NoSchedule(), whole.slots)
        groups[key].states.append(WholeState(name, whole))
    return list(groups.values())
