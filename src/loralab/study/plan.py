"""What a study will cost, before anything of it runs."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.study import search
from loralab.study.backend import Backend, set_up
from loralab.study.guards import check_at_least_one
from loralab.study.packing import pack_trials
from loralab.study.parse import read_spec
from loralab.study.probe import Probe, measure
from loralab.study.results import MethodChoice
from loralab.study.search import Planned
from loralab.study.spec import StudySpec
from loralab.training.progress import time_text


@dataclass(frozen=True)
class PlannedPack:
    """One pack to come.

    Args:
        labels: (label, number of its trials) pairs.
        steps: optimizer steps.
        bytes_: estimated memory beside the base model.
        seconds: estimated time, scoring included.
    """

    stage: str
    labels: tuple[tuple[str, int], ...]
    n_trials: int
    steps: int
    bytes_: int
    seconds: float


@dataclass(frozen=True)
class StudyPlan:
    """A study before it runs. Memory and time are estimates from a few real steps.

    Args:
        n_widening: the most trials that widening can add.
        workers: how many packs run at once.
        tokens: training tokens (or items) of grid and confirm stage.
        model_bytes: the frozen base.
        within_budget: whether grid and confirm stage fit the spec's budget.
    """

    name: str
    hash: str
    trials: dict[str, int]
    n_widening: int
    grids: dict[str, list[float]]
    packs: list[PlannedPack]
    tokens: float
    model_bytes: int
    max_slots: int
    workers: int
    within_budget: bool

    @property
    def seconds(self) -> float:
        """Return the estimated time of all packs, as many at once as there are workers."""
        total = 0.0
        for stage in self.trials:
            times = [pack.seconds for pack in self.packs if pack.stage == stage]
            total += max([sum(times) / self.workers, *times])
        return total

    @property
    def bytes_(self) -> int:
        """Return the estimated memory of base and largest pack, in every worker."""
        each = self.model_bytes + max((pack.bytes_ for pack in self.packs), default=0)
        return self.workers * each

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        totals = {"seconds": self.seconds, "bytes": self.bytes_, "estimate": True}
        return dataclasses.asdict(self) | totals

    def text(self) -> str:
        """Return the plan for people, one pack per line."""
        trials = ", ".join(f"{n} {stage}" for stage, n in self.trials.items())
        lines = [
            f"study {self.name} ({self.hash})",
            f"trials: {trials}; widening may add up to {self.n_widening}",
            *(f"  {label}: learning rates {_span(grid)}" for label, grid in self.grids.items()),
            f"packs: {len(self.packs)}, up to {self.max_slots} trials each, {self.workers} at once",
            *(_pack_line(i, pack) for i, pack in enumerate(self.packs, 1)),
            f"training tokens or items: {self.tokens:.3g}",
            f"memory: about {_bytes(self.bytes_)}, {_bytes(self.workers * self.model_bytes)} of it "
            "the base",
            f"time: about {time_text(self.seconds)} without widening",
            "memory and time are estimates from a few real steps on this machine",
        ]
        if not self.within_budget:
            lines.append("this is more than the budget: the study would refuse to run")
        return "\n".join(lines)


def _span(grid: Sequence[float]) -> str:
    return f"{len(grid)}, {grid[0]:g} to {grid[-1]:g}"


def _pack_line(number: int, pack: PlannedPack) -> str:
    what = ", ".join(f"{label} x{n}" for label, n in pack.labels)
    return (
        f"  {number:3d} {pack.stage:7s} {pack.n_trials:3d} trials x {pack.steps} steps, "
        f"{_bytes(pack.bytes_)}, {time_text(pack.seconds)}: {what}"
    )


def _bytes(n: float) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"


def plan_study(
    spec: str | Path | StudySpec,
    *,
    max_slots: int | None = None,
    device: str | None = None,
    workers: int | None = None,
    backend: Backend = Backend(),  # noqa: B008
) -> StudyPlan:
    """Return what `run_study` would do. It trains three steps of each method to measure.

    Raises:
        UserError: a wrong spec, a number below 1, or a model or task that cannot be loaded.
    """
    from loralab.study.crew import default_size, devices_of
    from loralab.training.memory import available_bytes

    check_at_least_one(max_slots=max_slots, workers=workers)
    source = Path.cwd() if isinstance(spec, StudySpec) else Path(spec).absolute().parent
    spec = spec if isinstance(spec, StudySpec) else read_spec(spec)
    bench = set_up(spec, source, device, backend)
    parts = search.families(spec)
    grid = search.grid_trials(spec, bench.n_train, parts)
    probe = measure(bench, grid)
    # Which learning rates win is not known yet; for the cost any will do.
    winners = [
        MethodChoice(*f.key, best_lr=spec.grid(f.method).point(0)) for f in search.families(spec)
    ]
    confirm = search.confirm_trials(spec, bench.n_train, winners)
    sizes = {split: bench.task.size(split) for split in ("validation", "test")}
    n_items = {"grid": sizes["validation"], "confirm": sum(sizes.values())}
    room, devices = available_bytes(bench.device), devices_of(device)
    size = workers or default_size(devices, bench, room)
    limit = max_slots or probe.max_slots(grid, room, -(-size // len(devices)))
    packs = [
        _planned_pack(pack, probe, n_items[pack[0].stage])
        for stage in (grid, confirm)
        for pack in pack_trials(stage, limit, size)
    ]
    n_widening = search.MAX_WIDENINGS * search.POINTS_PER_WIDENING * len(spec.seeds) * len(parts)
    n_rows = search.cost(spec, bench.n_train, parts)[1]
    return StudyPlan(
        name=spec.name,
        hash=spec.hash,
        trials={"grid": len(grid), "confirm": len(confirm)},
        n_widening=n_widening if spec.widen else 0,
        grids={method.label: spec.grid(method).points() for method in spec.methods},
        packs=packs,
        tokens=n_rows * probe.row_tokens,
        model_bytes=probe.model_bytes,
        max_slots=limit,
        workers=size,
        within_budget=search.within_budget(spec, bench.n_train, parts, probe.row_tokens),
    )


def _planned_pack(pack: Sequence[Planned], probe: Probe, n_items: int) -> PlannedPack:
    return PlannedPack(
        stage=pack[0].stage,
        labels=tuple(Counter(planned.label for planned in pack).items()),
        n_trials=len(pack),
        steps=pack[0].trial.steps,
        bytes_=sum(probe.slot_bytes(planned) for planned in pack),
        seconds=sum(probe.seconds(planned, n_items) for planned in pack),
    )
