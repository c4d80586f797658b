"""Which trials a study needs next: pure functions of the spec and of what is finished.

Every (label, rank, batch size) is a family with a learning-rate grid of its own. Rounds are shared:
round 0 is the grid, rounds 1 and 2 widen the families whose optimum lies at an edge. Nothing
is remembered between rounds, so a killed search goes on where it was.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from loralab.study.grid import MAX_WIDENINGS, POINTS_PER_WIDENING
from loralab.study.results import Key, MethodChoice, TrialResult
from loralab.study.spec import MethodSpec, StudySpec
from loralab.study.trial import Trial


@dataclass(frozen=True)
class Planned:
    """A trial with its place in the study."""

    trial: Trial
    label: str
    stage: str


@dataclass
class Family:
    """A (label, rank, batch size) and the grid indices that are tested."""

    method: MethodSpec
    rank: int
    batch_size: int
    low: int
    high: int
    widened: int = 0

    @property
    def key(self) -> Key:
        """Return (label, rank, batch size)."""
        return self.method.label, self.rank, self.batch_size


@dataclass(frozen=True)
class Round:
    """What the grid stage needs next.

    Args:
        pending: trials to run now; empty when the grid stage is finished.
        choices: one per family once round 0 is finished, as seen so far.
        number: 0 for the grid itself, then the widening.
        refused: families that the budget kept from growing.
    """

    pending: list[Planned]
    choices: list[MethodChoice]
    number: int
    refused: list[Key]


def families(spec: StudySpec) -> list[Family]:
    """Return every family with its first grid."""
    return [
        Family(method, rank, batch_size, 0, spec.grid(method).n - 1)
        for method in spec.methods
        for rank in spec.ranks
        for batch_size in spec.batch_sizes
    ]


def grid_trials(spec: StudySpec, n_train: int, parts: Iterable[Family]) -> list[Planned]:
    """Return the grid trials of `parts`, learning rates ascending, then seeds."""
    return [
        Planned(
            spec.trial(f.method, f.rank, f.batch_size, lr, seed, n_train), f.method.label, "grid"
        )
        for f in parts
        for lr in spec.grid(f.method).points(f.low, f.high)
        for seed in spec.seeds
    ]


def confirm_trials(spec: StudySpec, n_train: int, choices: Sequence[MethodChoice]) -> list[Planned]:
    """Return each family's winner on the fresh seeds; a family without a winner has none."""
    methods = {method.label: method for method in spec.methods}
    return [
        Planned(
            spec.trial(methods[c.label], c.rank, c.batch_size, c.best_lr, seed, n_train),
            c.label,
            "confirm",
        )
        for c in choices
        if c.best_lr is not None
        for seed in spec.confirm_seeds
    ]


def curvature_trials(
    spec: StudySpec, n_train: int, choices: Sequence[MethodChoice]
) -> dict[str, Trial]:
    """Return one trial per label: first rank, batch size and grid seed, at the chosen rate."""
    methods = {method.label: method for method in spec.methods}
    trials: dict[str, Trial] = {}
    for c in choices:
        method = methods[c.label]
        lr = c.best_lr if c.best_lr is not None else spec.grid(method).point(0)
        trial = spec.trial(method, c.rank, c.batch_size, lr, spec.seeds[0], n_train)
        trials.setdefault(c.label, trial)
    return trials


def point_means(results: Iterable[TrialResult], n_seeds: int) -> dict[Key, dict[float, float]]:
    """Return the mean validation metric per family and learning rate.

    A point of which any seed diverged or was stopped has no mean and cannot win.
    """
    scores: dict[Key, dict[float, list[float]]] = {}
    for result in results:
        if result.stage == "grid" and result.status == "done" and result.validation is not None:
            family = scores.setdefault(result.key, {})
            family.setdefault(result.trial.lr, []).append(result.validation)
    return {
        key: {lr: fmean(found) for lr, found in points.items() if len(found) == n_seeds}
        for key, points in scores.items()
    }


def final_losses(results: Iterable[TrialResult]) -> dict[Key, dict[float, float]]:
    """Return per family and learning rate the mean of the last training losses of its seeds."""
    losses: dict[Key, dict[float, list[float]]] = {}
    for result in results:
        if result.stage == "grid" and result.curve:
            last = fmean(loss for _, loss in result.curve[-3:])
            losses.setdefault(result.key, {}).setdefault(result.trial.lr, []).append(last)
    return {
        key: {lr: fmean(found) for lr, found in points.items()} for key, points in losses.items()
    }


def best_point(
    points: Mapping[float, float],
    higher_is_better: bool,
    losses: Mapping[float, float] | None = None,
) -> float | None:
    """Return the learning rate with the best mean metric.

    Of equal ones it is the middle, the lower if their number is even. When all points are equal
    the metric says nothing (no item solved anywhere, say), and the lowest training loss decides.
    """
    if not points:
        return None
    top = max(points.values()) if higher_is_better else min(points.values())
    tied = sorted(lr for lr, mean in points.items() if mean == top)
    if losses and len(tied) == len(points):
        return min(tied, key=lambda lr: losses.get(lr, float("inf")))
    return tied[(len(tied) - 1) // 2]


def _edge(spec: StudySpec, family: Family, best: float | None) -> str:
    grid = spec.grid(family.method)
    if best is None or best == grid.point(family.low):
        return "low"
    return "high" if best == grid.point(family.high) else ""


def _choices(
    spec: StudySpec,
    parts: Sequence[Family],
    results: Sequence[TrialResult],
    higher_is_better: bool,
) -> list[MethodChoice]:
    means, losses = point_means(results, len(spec.seeds)), final_losses(results)
    choices = []
    for f in parts:
        tested = set(spec.grid(f.method).points(f.low, f.high))
        known = {lr: mean for lr, mean in means.get(f.key, {}).items() if lr in tested}
        best = best_point(known, higher_is_better, losses.get(f.key))
        edge = _edge(spec, f, best)
        choices.append(
            MethodChoice(*f.key, best, at_edge=edge, widened=f.widened, lower_bound=edge != "")
        )
    return choices


def grid_round(
    spec: StudySpec,
    n_train: int,
    results: Sequence[TrialResult],
    higher_is_better: bool,
    tokens_per_row: float = 0.0,
) -> Round:
    """Return what the grid stage needs next, given all that is finished.

    A family whose every point diverged counts as having its optimum at the low edge. The budget
    stops widening when the next round and the confirm stage no longer fit.
    """
    finished = {result.trial.id for result in results}
    parts = families(spec)
    refused: list[Key] = []
    for number in range(MAX_WIDENINGS + 1):
        pending = [p for p in grid_trials(spec, n_train, parts) if p.trial.id not in finished]
        if pending and number == 0:
            return Round(pending, [], number, refused)
        choices = _choices(spec, parts, results, higher_is_better)
        if pending or number == MAX_WIDENINGS or not spec.widen:
            break
        refused += _widen(spec, n_train, parts, choices, tokens_per_row)
    return Round(pending, choices, number, refused)


def _widen(
    spec: StudySpec,
    n_train: int,
    parts: Sequence[Family],
    choices: Sequence[MethodChoice],
    tokens_per_row: float,
) -> list[Key]:
    """Grow in place the families at an edge; return those that the budget refuses."""
    refused = []
    for family, choice in zip(parts, choices, strict=True):
        if not choice.at_edge:
            continue
        low, high = family.low, family.high
        if choice.at_edge == "low":
            family.low -= POINTS_PER_WIDENING
        else:
            family.high += POINTS_PER_WIDENING
        family.widened += 1
        if not within_budget(spec, n_train, parts, tokens_per_row):
            family.low, family.high, family.widened = low, high, family.widened - 1
            refused.append(family.key)
    return refused


def cost(spec: StudySpec, n_train: int, parts: Sequence[Family]) -> tuple[int, int]:
    """Return (trials, training rows) of the grid stage and the confirm stage together."""
    n_trials = n_rows = 0
    for f in parts:
        trials = (f.high - f.low + 1) * len(spec.seeds) + len(spec.confirm_seeds)
        n_trials += trials
        n_rows += trials * spec.n_steps(f.batch_size, n_train) * f.batch_size
    return n_trials, n_rows


def within_budget(
    spec: StudySpec, n_train: int, parts: Sequence[Family], tokens_per_row: float
) -> bool:
    """Return whether the study, as far as it is planned, fits the budget."""
    n_trials, n_rows = cost(spec, n_train, parts)
    if spec.max_trials is not None and n_trials > spec.max_trials:
        return False
    return spec.max_tokens is None or n_rows * tokens_per_row <= spec.max_tokens
