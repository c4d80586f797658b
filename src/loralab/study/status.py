"""How far a study is, read from its store while it runs or after."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.study.results import StudyResults
from loralab.study.search import best_point, final_losses, point_means
from loralab.study.store import Store


@dataclass(frozen=True)
class Best:
    """The best learning rate of a family so far, on validation."""

    label: str
    rank: int
    batch_size: int
    lr: float
    validation: float


@dataclass(frozen=True)
class Status:
    """A study's progress.

    Args:
        finished: when it ended (UTC), or None.
        trials: {stage: {status: number of trials}}; "waiting" counts those to come.
        best: per family, over the points finished on every seed.
    """

    finished: str | None
    trials: dict[str, dict[str, int]]
    metric: str
    best: list[Best]
    events: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """Return the status for people."""
        lines = [f"finished {self.finished}" if self.finished else "not finished"]
        for stage, counts in self.trials.items():
            total = sum(counts.values())
            ended = total - counts.get("waiting", 0)
            parts = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
            lines.append(f"{stage}: {ended} of {total} trials ({parts})")
        if self.best:
            lines.append(f"best so far, {self.metric} on validation:")
        for b in self.best:
            where = f"{b.label}, rank {b.rank}, batch {b.batch_size}"
            lines.append(f"  {where}: {b.validation:.4g} at lr {b.lr:g}")
        lines += [f"{e['time']} {e['kind']}" for e in self.events]
        return "\n".join(lines)


def study_status(place: str | Path) -> Status:
    """Return the progress of the study in `place`, without disturbing a run.

    Raises:
        UserError: there is no study.
    """
    with Store.open(place) as store:
        found = store.results(with_items=False)
        return Status(
            finished=found.environment["finished"],
            trials=store.counts(),
            metric=found.metric,
            best=best_so_far(found),
            events=found.events,
        )


def best_so_far(results: StudyResults) -> list[Best]:
    """Return each family's best point among those finished on every seed."""
    means = point_means(results.trials, len(results.spec["seeds"]))
    losses = final_losses(results.trials)
    best = []
    for key, points in means.items():
        lr = best_point(points, results.higher_is_better, losses.get(key))
        if lr is not None:
            best.append(Best(*key, lr=lr, validation=points[lr]))
    return best
