"""The engine: grid, widening, curvature, confirmation, every step stored."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from loralab.errors import UserError
from loralab.study import search
from loralab.study.backend import Backend, Bench, set_up
from loralab.study.environment import environment
from loralab.study.guards import only_one, readable_disk_errors
from loralab.study.outcomes import result_of
from loralab.study.packing import halves, pack_trials
from loralab.study.parse import read_spec
from loralab.study.probe import Probe, measure
from loralab.study.results import MethodChoice, TrialResult
from loralab.study.search import Planned
from loralab.study.spec import StudySpec
from loralab.study.store import Store, StoredPack
from loralab.study.trial import Trial
from loralab.training.progress import Progress

FAILED = "curvature failed"
SPLITS = {"grid": ("validation",), "confirm": ("validation", "test")}


def default_folder(path: str | Path) -> Path:
    """Return the folder of a study that is not told where to go: out/<name of the file>."""
    return Path("out") / Path(path).stem


def run_study(
    spec: str | Path | StudySpec,
    out: str | Path | None = None,
    progress: Progress | None = None,
    *,
    max_slots: int | None = None,
    device: str | None = None,
    checkpoint_every: int = 50,
    backend: Backend = Backend(),  # noqa: B008
) -> Path:
    """Run the study, or what is left of it, and return its folder.

    The grid is trained first, then widened where an optimum lies at its edge, then each family's
    winner is trained on fresh seeds and looks at the test split, once. A finished study
    runs nothing. A killed one goes on: packs keep their trials, the interrupted pack its steps.

    Args:
        spec: study.toml, or a checked spec.
        out: the study's folder; `default_folder` if not given.
        progress: an entered `Progress`; None shows nothing.
        max_slots: the most trials per pack; None measures how many fit.
        device: None takes the first CUDA device if there is one.
        checkpoint_every: steps between checkpoints of a pack.

    Raises:
        UserError: a wrong spec, a folder with another study, a study that runs already, a budget
            too small, no memory for one trial, no room or permission to write.
    """
    source = Path.cwd() if isinstance(spec, StudySpec) else Path(spec).absolute().parent
    name = spec.name if isinstance(spec, StudySpec) else spec
    spec = spec if isinstance(spec, StudySpec) else read_spec(spec)
    folder = Path(out) if out is not None else default_folder(name)
    with (
        Store.create(folder, spec.store) as store,
        readable_disk_errors(folder),
        only_one(folder),
    ):
        begin(store, spec)
        if store.study()["finished"] is None:
            bench = set_up(spec, source, device, backend)
            show = progress or Progress(quiet=True)
            Engine(bench, store, folder, show, max_slots, checkpoint_every).run()
    return folder


def begin(store: Store, spec: StudySpec) -> None:
    """Record a new study, or that an unfinished one goes on and with which versions."""
    now = environment()
    if store.begin(spec.to_dict(), spec.hash, now):
        return
    study = store.study()
    if study["finished"] is None:
        old = study["environment"]
        changed = sorted(key for key in now if now[key] != old.get(key))
        store.add_event("resumed", changed=changed)


@dataclass
class Engine:
    """One run of a study, from whatever the store holds to the end."""

    bench: Bench
    store: Store
    folder: Path
    progress: Progress
    max_slots: int | None
    checkpoint_every: int
    row_tokens: float = 0.0
    probe: Probe | None = None

    @property
    def spec(self) -> StudySpec:
        """Return the study's spec."""
        return self.bench.spec

    def run(self) -> None:
        """Run every stage."""
        task = self.bench.task
        self.store.describe(task.metric, task.higher_is_better, self.bench.n_train)
        self._check_budget()
        choices = self._grid()
        self._curvature(choices)
        self._stage("confirm", search.confirm_trials(self.spec, self.bench.n_train, choices))
        self.store.finish(choices)

    def _check_budget(self) -> None:
        spec, n_train = self.spec, self.bench.n_train
        parts = search.families(spec)
        if spec.max_tokens is not None:
            self.row_tokens = self.bench.row_tokens
        if not search.within_budget(spec, n_train, parts, self.row_tokens):
            n_trials, n_rows = search.cost(spec, n_train, parts)
            raise UserError(
                f"the study needs {n_trials} trials and about {n_rows * self.row_tokens:.0f} "
                "tokens before any widening, more than its budget; raise the budget, "
                "or take fewer methods, learning rates, ranks, batch sizes or seeds"
            )

    def _grid(self) -> list[MethodChoice]:
        """Run the grid and its widening; return the choices."""
        while True:
            self._run_waiting()
            done = self.store.results(with_items=False)
            found = search.grid_round(
                self.spec,
                self.bench.n_train,
                done.grid,
                self.bench.task.higher_is_better,
                self.row_tokens,
            )
            self.store.set_choices(found.choices)
            if not found.pending:
                break
            if found.number:
                grown = sorted({"/".join(map(str, _key(p))) for p in found.pending})
                self.store.add_event("widened", round=found.number, families=grown)
                self.progress.say(f"optimum at the edge, widening the grid of {', '.join(grown)}")
            self._stage("grid", found.pending)
        if found.refused and not self.store.has_event("budget"):
            refused = sorted({"/".join(map(str, key)) for key in found.refused})
            self.store.add_event("budget", not_widened=refused)
        return found.choices

    def _stage(self, stage: str, planned: Sequence[Planned]) -> None:
        """Pack and run the trials that the store does not know yet."""
        known = self.store.known()
        fresh = [p for p in planned if p.trial.id not in known]
        if fresh:
            self.store.add_packs(stage, fresh, pack_trials(fresh, self._slots()))
        self._run_waiting()

    def _slots(self) -> int | Callable[[Sequence[Planned]], int]:
        if self.max_slots is not None:
            return self.max_slots
        if self.probe is None:
            self.progress.say("measuring memory on three steps of every method")
            n_train = self.bench.n_train
            parts = search.families(self.spec)
            self.probe = measure(self.bench, search.grid_trials(self.spec, n_train, parts))
        return partial(self.probe.max_slots, device=self.bench.device)

    def _run_waiting(self) -> None:
        while (pack := self.store.next_pack()) is not None:
            self._announce()
            results = None
            try:
                results = self._train(pack)
            except (MemoryError, RuntimeError) as error:
                self._check_memory(pack, error)
            # Outside the handler, where the error's frames no longer hold the pack's tensors.
            if results is None:
                self._split(pack)
            else:
                self.store.finish_pack(pack.id, results)
            self._checkpoint(pack).unlink(missing_ok=True)

    def _announce(self) -> None:
        """Tell the progress how much is left, the confirm stage included."""
        left = self.store.slot_steps_waiting()
        if "confirm" not in self.store.counts():
            for family in search.families(self.spec):
                steps = self.spec.n_steps(family.batch_size, self.bench.n_train)
                left += steps * len(self.spec.confirm_seeds)
        self.progress.expect(left)

    def _checkpoint(self, pack: StoredPack) -> Path:
        return self.folder / "checkpoints" / f"pack-{pack.id}.safetensors"

    def _train(self, pack: StoredPack) -> list[TrialResult]:
        trials = [planned.trial for planned in pack.planned]
        labels = list(dict.fromkeys(planned.label for planned in pack.planned))
        shown = ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if labels[3:] else "")
        trained = self.bench.train(
            trials,
            pack.stage,
            checkpoint=self._checkpoint(pack),
            checkpoint_every=self.checkpoint_every,
            progress=self.progress.pack(
                f"{pack.stage} pack {pack.id}: {shown}", trials[0].steps, len(trials)
            ),
        )
        try:
            scores = {
                split: np.asarray(trained.evaluate(split), dtype=np.float32)
                for split in SPLITS[pack.stage]
            }
        finally:
            trained.close()
        return [
            result_of(planned, outcome, {split: rows[i] for split, rows in scores.items()})
            for i, (planned, outcome) in enumerate(zip(pack.planned, trained.outcomes, strict=True))
        ]

    def _check_memory(self, pack: StoredPack, error: BaseException) -> None:
        """Let any error pass but the lack of memory of a pack that can be halved."""
        from loralab.training.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise error
        if len(pack.planned) == 1:
            one = pack.planned[0]
            raise UserError(
                f"one trial of {one.label} (rank {one.trial.rank}, batch size "
                f"{one.trial.batch_size}) does not fit in memory; take a smaller batch size, rank "
                "or model (what is stored already stays)"
            ) from error

    def _split(self, pack: StoredPack) -> None:
        free_memory()
        self.progress.say(f"out of memory with {len(pack.planned)} trials: halving the pack")
        self.store.split_pack(pack, halves([planned.trial.id for planned in pack.planned]))

    def _curvature(self, choices: Sequence[MethodChoice]) -> None:
        """Measure curvature once per label; what fails is recorded and costs nothing else."""
        if self.spec.curvature is None:
            return
        stored = self.store.results(with_items=False)
        done = {row["label"] for row in stored.curvature}
        done |= {event["label"] for event in stored.events if event["kind"] == FAILED}
        trials = search.curvature_trials(self.spec, self.bench.n_train, choices)
        for label, trial in trials.items():
            if label in done:
                continue
            self.progress.say(f"measuring curvature of {label} at initialisation")
            try:
                self.store.add_curvature(self._measured({label: trial}))
            except (RuntimeError, NotImplementedError, UserError) as error:
                cause = (str(error).splitlines() or [type(error).__name__])[0]
                self.store.add_event(FAILED, label=label, cause=cause)
                self.progress.say(f"no curvature of {label}: {cause}")

    def _measured(self, trials: dict[str, Trial]) -> list[dict[str, Any]]:
        bench = self.bench
        return bench.backend.curvature(bench.model, bench.task, trials, way=self.spec.curvature)


def _key(planned: Planned) -> tuple[str, int, int]:
    return planned.label, planned.trial.rank, planned.trial.batch_size


def free_memory() -> None:
    """Give memory of a failed pack back to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
