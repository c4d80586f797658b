"""The engine: grid, widening, confirmation and curvature, every step stored."""

import gc
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from loralab.errors import UserError
from loralab.study import search
from loralab.study.backend import Bench
from loralab.study.crew import Crew
from loralab.study.jobs import CurvatureJob, Job, PackJob, Reply
from loralab.study.packing import halves, pack_trials
from loralab.study.probe import Probe, measure
from loralab.study.records import StoredPack
from loralab.study.results import MethodChoice
from loralab.study.search import Planned
from loralab.study.spec import StudySpec
from loralab.study.store import Store
from loralab.training.progress import Progress

FAILED, DIED = "curvature failed", "worker died"


@dataclass
class Engine:
    """One run of a study, from whatever the store holds to the end.

    Args:
        room: bytes free on the device before any worker started.
        sharing: how many workers share a device.
    """

    bench: Bench
    store: Store
    folder: Path
    progress: Progress
    crew: Crew
    max_slots: int | None
    checkpoint_every: int
    room: int = 0
    sharing: int = 1
    row_tokens: float = 0.0
    probe: Probe | None = None
    deaths: dict[str, int] = field(default_factory=dict)

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
        confirm = search.confirm_trials(self.spec, self.bench.n_train, choices)
        self._stage("confirm", confirm, self._curvature(choices))
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
        self._perform(self._waiting())
        while True:
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

    def _stage(self, stage: str, planned: Sequence[Planned], more: Sequence[Job] = ()) -> None:
        """Pack the trials that the store does not know yet; run them and what waits besides."""
        known = self.store.known()
        fresh = [p for p in planned if p.trial.id not in known]
        if fresh:
            self.crew.prepare(len(fresh))
            packs = pack_trials(fresh, self._slots(), self.crew.size)
            self.store.add_packs(stage, fresh, packs)
            self.store.add_event(
                "packed", stage=stage, packs=len(packs), trials=len(fresh), workers=self.crew.size
            )
        self._perform([*self._waiting(), *more])

    def _slots(self) -> int | Callable[[Sequence[Planned]], int]:
        if self.max_slots is not None:
            return self.max_slots
        if self.probe is None:
            self.progress.say("measuring memory on three steps of every method")
            n_train = self.bench.n_train
            parts = search.families(self.spec)
            self.probe = measure(self.bench, search.grid_trials(self.spec, n_train, parts))
        return partial(self.probe.max_slots, room=self.room, sharing=self.sharing)

    def _waiting(self) -> list[PackJob]:
        return [self._job(pack) for pack in self.store.unfinished_packs()]

    def _job(self, pack: StoredPack) -> PackJob:
        checkpoint = self.folder / "checkpoints" / f"pack-{pack.id}.safetensors"
        return PackJob(pack, checkpoint, self.checkpoint_every)

    def _perform(self, jobs: Sequence[Job]) -> None:
        """Do the jobs and those that come of them, as many at once as the crew can."""
        waiting = deque(jobs)
        while waiting or self.crew.busy:
            while waiting and self.crew.free:
                job = waiting.popleft()
                if isinstance(job, PackJob):
                    self.store.start_pack(job.pack.id)
                self._announce()
                self.crew.give(job)
            job, reply = self.crew.take()
            again = self._ended(job, reply)
            waiting.extendleft(reversed(again))

    def _announce(self) -> None:
        """Tell the progress how much is left, the confirm stage included."""
        left = self.store.slot_steps_waiting()
        if "confirm" not in self.store.counts():
            for family in search.families(self.spec):
                steps = self.spec.n_steps(family.batch_size, self.bench.n_train)
                left += steps * len(self.spec.confirm_seeds)
        self.progress.expect(left)

    def _ended(self, job: Job, reply: Reply) -> list[Job]:
        """Store what the job gave; return the jobs that take its place if it gave nothing."""
        if isinstance(job, PackJob):
            return self._pack_ended(job, reply)
        return self._curvature_ended(job, reply)

    def _pack_ended(self, job: PackJob, reply: Reply) -> list[Job]:
        """Store the results; a pack that was too large is halved."""
        if reply.kind == "done":
            self.store.finish_pack(job.pack.id, reply.value)
            job.checkpoint.unlink(missing_ok=True)
            return []
        if reply.kind == "died" and self._first_death(job, reply):
            return [job]  # from its checkpoint, so that the numbers stay what they would have been
        pack, why = job.pack, "out of memory" if reply.kind == "memory" else DIED
        if len(pack.planned) == 1:
            raise UserError(_too_large(pack.planned[0], reply))
        free_memory()
        self.progress.say(f"{why} with {len(pack.planned)} trials: halving the pack")
        parts = halves([planned.trial.id for planned in pack.planned])
        split = self.store.split_pack(pack, parts, why)
        job.checkpoint.unlink(missing_ok=True)
        return [self._job(part) for part in split]

    def _first_death(self, job: Job, reply: Reply) -> bool:
        """Record that the worker on this job died; return whether it is the first time."""
        self.deaths[job.title] = self.deaths.get(job.title, 0) + 1
        self.store.add_event(DIED, job=job.title, cause=reply.cause)
        self.progress.say(f"the worker of {job.title} died ({reply.cause})")
        return self.deaths[job.title] == 1

    def _curvature(self, choices: Sequence[MethodChoice]) -> list[CurvatureJob]:
        """Return what is left to measure, once per label."""
        if self.spec.curvature is None:
            return []
        stored = self.store.results(with_items=False)
        done = {row["label"] for row in stored.curvature}
        done |= {event["label"] for event in stored.events if event["kind"] == FAILED}
        trials = search.curvature_trials(self.spec, self.bench.n_train, choices)
        return [CurvatureJob(label, t) for label, t in trials.items() if label not in done]

    def _curvature_ended(self, job: CurvatureJob, reply: Reply) -> list[Job]:
        """Store the rows; what failed is recorded and costs nothing else."""
        if reply.kind == "done":
            self.store.add_curvature(reply.value)
        elif reply.kind == "died" and self._first_death(job, reply):
            return [job]
        else:
            self.store.add_event(FAILED, label=job.label, cause=reply.cause)
            self.progress.say(f"no curvature of {job.label}: {reply.cause}")
        return []


def _key(planned: Planned) -> tuple[str, int, int]:
    return planned.label, planned.trial.rank, planned.trial.batch_size


def _too_large(one: Planned, reply: Reply) -> str:
    what = f"one trial of {one.label} (rank {one.trial.rank}, batch size {one.trial.batch_size})"
    advice = "take a smaller batch size, rank or model"
    if reply.kind == "memory":
        return f"{what} does not fit in memory; {advice} (what is stored already stays)"
    return (
        f"the process that trained {what} was ended twice ({reply.cause}); if memory is short, "
        f"take fewer with --workers, or {advice} (what is stored already stays)"
    )


def free_memory() -> None:
    """Give memory of a failed pack back to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
