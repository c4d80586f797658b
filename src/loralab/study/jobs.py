"""What a worker does: train a pack, or measure one label's curvature."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loralab.errors import UserError
from loralab.study.backend import Bench
from loralab.study.outcomes import result_of
from loralab.study.records import StoredPack
from loralab.study.results import TrialResult
from loralab.study.trial import Trial

SPLITS = {"grid": ("validation",), "confirm": ("validation", "test")}
Steps = Callable[[int, int, list[float]], None]


@dataclass(frozen=True)
class Reply:
    """How a job ended.

    Args:
        kind: "done" with a value; "memory", it ran out; "refused", the job cannot be done and
            `cause` says why; "died", the worker did.
    """

    kind: str
    value: Any = None
    cause: str = ""


@dataclass(frozen=True)
class PackJob:
    """Train and score a pack."""

    pack: StoredPack
    checkpoint: Path
    checkpoint_every: int

    @property
    def title(self) -> str:
        """Return the name that people see."""
        labels = list(dict.fromkeys(planned.label for planned in self.pack.planned))
        shown = ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if labels[3:] else "")
        return f"{self.pack.stage} pack {self.pack.id}: {shown}"

    @property
    def size(self) -> tuple[int, int]:
        """Return (steps, trials)."""
        return self.pack.planned[0].trial.steps, len(self.pack.planned)

    def run(self, bench: Bench, progress: Steps) -> Reply:
        """Return the results of the trials, in their order, or that memory ran out."""
        from loralab.training.memory import is_out_of_memory

        try:
            return Reply("done", self._train(bench, progress))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return Reply("memory", cause=str(error))

    def _train(self, bench: Bench, progress: Steps) -> list[TrialResult]:
        trained = bench.train(
            [planned.trial for planned in self.pack.planned],
            self.pack.stage,
            checkpoint=self.checkpoint,
            checkpoint_every=self.checkpoint_every,
            progress=progress,
        )
        try:
            scores = {
                split: np.asarray(trained.evaluate(split), dtype=np.float32)
                for split in SPLITS[self.pack.stage]
            }
        finally:
            trained.close()
        return [
            result_of(planned, outcome, {split: rows[i] for split, rows in scores.items()})
            for i, (planned, outcome) in enumerate(
                zip(self.pack.planned, trained.outcomes, strict=True)
            )
        ]


@dataclass(frozen=True)
class CurvatureJob:
    """Measure curvature at initialisation."""

    label: str
    trial: Trial

    @property
    def title(self) -> str:
        """Return the name that people see."""
        return f"curvature of {self.label} at initialisation"

    @property
    def size(self) -> tuple[int, int]:
        """Return (1, 0): it makes no steps that count."""
        return 1, 0

    def run(self, bench: Bench, progress: Steps) -> Reply:
        """Return the label's rows, or why there are none."""
        trials, way = {self.label: self.trial}, bench.spec.curvature
        try:
            rows = bench.backend.curvature(bench.model, bench.task, trials, way=way)
        except (RuntimeError, NotImplementedError, UserError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            return Reply("refused", cause=lines[0])
        return Reply("done", rows)


Job = PackJob | CurvatureJob
