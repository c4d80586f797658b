"""Which trials train together: packs of trials that share model, task and length."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import inf

from loralab.study.search import Planned

MaxSlots = int | Callable[[Sequence[Planned]], int]

PACKS_PER_WORKER = 4  # so that a slow pack at the end leaves the other workers little to wait for
WORTH_A_PACK = 6  # trials; smaller packs waste time on what does not depend on their size
# A step of a pack costs a fixed part, about as much again per bank, and the slots themselves. A
# family cut in two hides its best trial from early stopping, so it stays whole where that is free.
PACK, BANK, FAMILY, UNEVEN = 1.0, 1.0, 0.25, 1e-3


def pack_trials(
    planned: Sequence[Planned], max_slots: MaxSlots, workers: int = 1
) -> list[list[Planned]]:
    """Return packs that cover `planned` once each.

    Inside a pack model, task and number of steps agree. Neighbours are of one batch size, one kind
    of bank (Form, rank, Rule) and one method as far as possible, because slots of equal sizes share
    their tensors. The packs depend on the arguments alone.

    Args:
        max_slots: the most trials per pack, or a function that gives it for a group of trials.
        workers: how many packs can run at once; there are at least as many packs if there are
            as many trials.
    """
    groups: dict[tuple[str, str, int], list[Planned]] = {}
    for item in planned:
        trial = item.trial
        groups.setdefault((trial.model, trial.task, trial.steps), []).append(item)
    packs = []
    for group in groups.values():
        limit = max(1, max_slots if isinstance(max_slots, int) else max_slots(group))
        items = _side_by_side(group)
        found = _cheapest(items, min(limit, _largest(len(items), workers)))
        if len(found) < min(workers, len(items)):
            found = _evenly(items, min(workers, len(items)))
        packs += found
    return packs


def _largest(n: int, workers: int) -> int:
    """Return the most trials per pack that keep `workers` busy to the end."""
    if workers == 1:
        return n
    wanted = max(workers, min(PACKS_PER_WORKER * workers, n // WORTH_A_PACK))
    return max(1, min(5 * n // (4 * wanted), -(-n // workers)))


def _side_by_side(group: Sequence[Planned]) -> list[Planned]:
    banks = {key: i for i, key in reversed(list(enumerate(map(_bank, group))))}
    labels = {item.label: i for i, item in reversed(list(enumerate(group)))}

    def place(item: Planned) -> tuple[int, int, int, int, float]:
        trial = item.trial
        return trial.batch_size, banks[_bank(item)], labels[item.label], trial.seed, trial.lr

    return sorted(group, key=place)


def _bank(item: Planned) -> str:
    from loralab.training.loop import slot_spec

    key = slot_spec(item.trial).bank_key
    return repr((item.trial.batch_size, item.trial.modules_to_train, key))


def _family(item: Planned) -> tuple[str, int, int, int]:
    return item.label, item.trial.rank, item.trial.batch_size, item.trial.seed


def _cheapest(items: Sequence[Planned], largest: int) -> list[list[Planned]]:
    """Return stretches of at most `largest` neighbours, cut where it costs least."""
    n, banks, families = len(items), [_bank(i) for i in items], [_family(i) for i in items]
    costs, starts = [0.0] + [inf] * n, [0] * (n + 1)
    for end in range(1, n + 1):
        kinds = 0.0
        for begin in range(end - 1, max(-1, end - 1 - largest), -1):
            alone = begin == end - 1
            kinds += BANK * (alone or banks[begin] != banks[begin + 1])
            kinds += FAMILY * (alone or families[begin] != families[begin + 1])
            uneven = UNEVEN * ((end - begin) / largest) ** 2
            cost = costs[begin] + PACK + kinds + uneven
            if cost < costs[end] - 1e-9:
                costs[end], starts[end] = cost, begin
    packs, end = [], n
    while end:
        packs.append(list(items[starts[end] : end]))
        end = starts[end]
    return packs[::-1]


def _evenly(items: Sequence[Planned], n_packs: int) -> list[list[Planned]]:
    ends = [round(i * len(items) / n_packs) for i in range(n_packs + 1)]
    return [list(items[a:b]) for a, b in pairwise(ends)]


def halves(trials: Sequence[str]) -> list[list[str]]:
    """Return the two halves of a pack of at least two trials, the first not smaller."""
    middle = (len(trials) + 1) // 2
    return [list(trials[:middle]), list(trials[middle:])]
