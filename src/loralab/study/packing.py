"""Which trials train together: packs of trials that share model, task and length."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from loralab.study.search import Planned

MaxSlots = int | Callable[[Sequence[Planned]], int]


def _together(planned: Planned) -> tuple[str, str, int]:
    trial = planned.trial
    return trial.model, trial.task, trial.steps


def pack_trials(planned: Sequence[Planned], max_slots: MaxSlots) -> list[list[Planned]]:
    """Return packs that cover `planned` once each.

    Inside a pack model, task and number of steps agree. Neighbours are of one batch size, one seed
    (one order of the data), one method and one rank as far as possible: slots of equal sizes share
    their tensors. Packs of the same kind differ by at most one trial in size, because a small last
    pack costs almost as much time as a full one.

    Args:
        max_slots: the most trials per pack, or a function that gives it for a group of trials.
    """
    groups: dict[tuple[str, str, int], list[Planned]] = {}
    for item in planned:
        groups.setdefault(_together(item), []).append(item)
    packs = []
    for group in groups.values():
        order = {item.label: i for i, item in reversed(list(enumerate(group)))}
        group.sort(key=lambda p: _nearness(p, order))
        limit = max(1, max_slots if isinstance(max_slots, int) else max_slots(group))
        packs += _evenly(group, limit)
    return packs


def _nearness(item: Planned, order: dict[str, int]) -> tuple[int, int, int, int, float]:
    trial = item.trial
    return trial.batch_size, trial.seed, order[item.label], trial.rank, trial.lr


def _evenly(items: list[Planned], limit: int) -> list[list[Planned]]:
    n_packs = -(-len(items) // limit)
    ends = [round(i * len(items) / n_packs) for i in range(n_packs + 1)]
    return [items[a:b] for a, b in pairwise(ends)]


def halves(trials: Sequence[str]) -> list[list[str]]:
    """Return the two halves of a pack of at least two trials, the first not smaller."""
    middle = (len(trials) + 1) // 2
    return [list(trials[:middle]), list(trials[middle:])]
