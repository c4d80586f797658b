"""Who does the jobs of a study: this process, or several that load the model once each.

On two cores two processes of one thread each are faster and steadier than one process of two
threads, because one step of a small model has too little work to share. Only the parent writes the
store and shows progress.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch

from loralab.errors import UserError
from loralab.study import search
from loralab.study.backend import Backend, Bench, set_up
from loralab.study.jobs import Job, Reply
from loralab.study.probe import WORKER_BYTES, model_bytes
from loralab.study.spec import StudySpec
from loralab.training.memory import available_bytes
from loralab.training.progress import Line, Progress

REPORT_SECONDS = 0.2  # between two progress messages of a worker


class Crew(Protocol):
    """Takes jobs and gives replies, in any order."""

    size: int

    @property
    def free(self) -> bool:
        """Return whether a job can be given."""

    @property
    def busy(self) -> bool:
        """Return whether a reply is to come."""

    def prepare(self, n_jobs: int) -> None:
        """Get ready for so many jobs, as far as that can be done beforehand."""

    def give(self, job: Job) -> None:
        """Start a job."""

    def take(self) -> tuple[Job, Reply]:
        """Wait for a reply."""

    def close(self) -> None:
        """Stop everything."""


class Alone:
    """The crew of one: this process does a job when its reply is asked for."""

    size = 1

    def __init__(self, bench: Bench, progress: Progress) -> None:
        self.bench, self.progress = bench, progress
        self.job: Job | None = None

    @property
    def free(self) -> bool:
        """Return whether a job can be given."""
        return self.job is None

    @property
    def busy(self) -> bool:
        """Return whether a reply is to come."""
        return self.job is not None

    def prepare(self, n_jobs: int) -> None:
        """Nothing is to be prepared."""

    def give(self, job: Job) -> None:
        """Keep the job."""
        self.job = job

    def take(self) -> tuple[Job, Reply]:
        """Do the job."""
        job, self.job = self.job, None
        assert job is not None
        reply = job.run(self.bench, self.progress.pack(job.title, *job.size))
        self.progress.finish()
        return job, reply

    def close(self) -> None:
        """Nothing is to be stopped."""


@dataclass(frozen=True)
class Order:
    """How a worker gets its bench."""

    spec: StudySpec
    folder: Path
    backend: Backend
    here: Path = field(default_factory=Path.cwd)


@dataclass(eq=False)
class _Worker:
    process: Any
    pipe: Connection
    ready: bool = False
    job: Job | None = None
    line: Line | None = None


class Workers:
    """Processes of one thread each, started when they are needed and stopped with this one.

    Args:
        order: what each of them loads.
        devices: one for each worker in turn.
    """

    def __init__(self, order: Order, size: int, devices: list[str], progress: Progress) -> None:
        self.order, self.size, self.devices, self.progress = order, size, devices, progress
        self.workers: list[_Worker] = []
        self.context = multiprocessing.get_context("spawn")

    @property
    def free(self) -> bool:
        """Return whether a job can be given."""
        return len(self.workers) < self.size or any(w.job is None for w in self.workers)

    @property
    def busy(self) -> bool:
        """Return whether a reply is to come."""
        return any(w.job is not None for w in self.workers)

    def prepare(self, n_jobs: int) -> None:
        """Start workers, so that they load the model while this process does something else."""
        while len(self.workers) < min(self.size, n_jobs):
            self._start()

    def give(self, job: Job) -> None:
        """Send the job to an idle worker, if possible one that has loaded its model."""
        idle = sorted((w for w in self.workers if w.job is None), key=lambda w: not w.ready)
        worker = idle[0] if idle else self._start()
        worker.job, worker.line = job, self.progress.begin(job.title, *job.size)
        with contextlib.suppress(OSError):  # it has died, which `take` will see
            worker.pipe.send(job)

    def take(self) -> tuple[Job, Reply]:
        """Show progress until a worker replies or dies.

        Raises:
            UserError: a worker cannot load the model.
        """
        while True:
            by_pipe = {w.pipe: w for w in self.workers}
            for pipe in wait(list(by_pipe)):
                worker = by_pipe[pipe]  # type: ignore[index]
                reply, job = self._hear(worker), worker.job
                if reply is not None and job is not None:
                    if worker.line is not None:
                        self.progress.end(worker.line)
                    worker.job = worker.line = None
                    return job, reply

    def close(self) -> None:
        """Stop all workers; what they did since their last checkpoint is lost."""
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
            worker.pipe.close()
        self.workers.clear()

    def _start(self) -> _Worker:
        used = [w.process.name for w in self.workers]
        number = next(i for i in range(self.size) if f"worker {i}" not in used)
        device = self.devices[number % len(self.devices)]
        ours, theirs = self.context.Pipe()
        process = self.context.Process(
            target=_work, args=(theirs, self.order, device), name=f"worker {number}", daemon=True
        )
        with _no_main(), _no_interrupt():
            process.start()
        theirs.close()  # so that our end closes when the worker dies
        worker = _Worker(process, ours)
        self.workers.append(worker)
        return worker

    def _hear(self, worker: _Worker) -> Reply | None:
        try:
            kind, value = worker.pipe.recv()
        except (EOFError, OSError):
            return self._bury(worker)
        if kind == "error":
            raise value
        if kind == "ready":
            worker.ready = True
        elif kind == "warning":
            warnings.warn(value, stacklevel=2)
        elif kind == "step" and worker.line is not None:
            self.progress.advance(worker.line, *value)
        return value if kind == "reply" else None

    def _bury(self, worker: _Worker) -> Reply:
        worker.process.join()
        worker.pipe.close()
        self.workers.remove(worker)
        code = worker.process.exitcode
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        if not worker.ready:
            raise UserError(
                f"a worker process ended with {cause} while it loaded the model; if memory is "
                "short, take fewer with --workers"
            )
        return Reply("died", cause=cause)


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """Keep new processes from running the user's script again, which may have no guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Let new processes start deaf to Ctrl-C; the parent hears it after."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


class _Line:
    """A worker's end of the pipe; messages of several threads do not mix."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.lock, self.told = pipe, threading.Lock(), 0.0

    def tell(self, kind: str, value: Any = None) -> None:
        with self.lock:
            self.pipe.send((kind, value))

    def step(self, step: int, n_steps: int, losses: list[float]) -> None:
        if step == n_steps or time.monotonic() - self.told >= REPORT_SECONDS:
            self.told = time.monotonic()
            self.tell("step", (step, n_steps, losses))

    def warn(self, message: Warning | str, *_: object, **__: object) -> None:
        self.tell("warning", str(message))


def _work(pipe: Connection, order: Order, device: str) -> None:
    """Load the bench, then do jobs until the pipe closes."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # stdout is for the command's answer
    line = _Line(pipe)
    warnings.showwarning = line.warn  # type: ignore[assignment]
    try:
        os.chdir(order.here)  # a new process begins where the first one did
        if device == "cpu":
            torch.set_num_threads(1)
        bench = set_up(order.spec, order.folder, device, order.backend)
        line.tell("ready")
        while True:
            job = pipe.recv()
            line.tell("reply", job.run(bench, line.step))
    except EOFError:
        return
    except BaseException as error:
        error.add_note(f"in a worker process:\n{traceback.format_exc()}")
        line.tell("error", _portable(error))


def _portable(error: BaseException) -> BaseException:
    """Return the error, or one that says the same if it cannot cross a pipe."""
    from multiprocessing.reduction import ForkingPickler

    try:
        again = ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:
        again = None
    same = type(again) is type(error) and str(again) == str(error)
    return error if same else RuntimeError(f"{type(error).__name__}: {error}")


def devices_of(device: str | None) -> list[str]:
    """Return the devices that workers take in turn: all GPUs, or the one that is asked for."""
    if device is not None:
        return [device]
    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [f"cuda:{i}" for i in range(n)] or ["cpu"]


def cores() -> int:
    """Return how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS or Windows
        return os.cpu_count() or 1


def default_size(devices: list[str], bench: Bench, room: int) -> int:
    """Return how many workers to take: one per GPU, or per core as far as bases fit in memory.

    Args:
        room: bytes free on the device.
    """
    spec = bench.spec
    n_trials = search.cost(spec, bench.n_train, search.families(spec))[0]
    if devices != ["cpu"]:
        return min(len(devices), n_trials)
    fit = room // (WORKER_BYTES + 3 * model_bytes(bench.model))
    return max(1, min(cores(), n_trials, fit))


@contextlib.contextmanager
def crew_for(
    bench: Bench, order: Order, workers: int | None, device: str | None, progress: Progress
) -> Iterator[tuple[Crew, int, int]]:
    """Give the crew, the bytes free on the device before it, and how many share a device.

    Args:
        workers: None takes the default; one does everything in this process.

    Raises:
        UserError: fewer than one worker.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers must be at least 1, not {workers}")
    room, devices = available_bytes(bench.device), devices_of(device)
    size = workers or default_size(devices, bench, room)
    if size == 1:
        yield Alone(bench, progress), room, 1
        return
    crew = Workers(order, size, devices, progress)
    threads = torch.get_num_threads()
    try:
        if devices == ["cpu"]:
            torch.set_num_threads(1)
        yield crew, room, -(-size // len(devices))
    finally:
        torch.set_num_threads(threads)
        crew.close()
