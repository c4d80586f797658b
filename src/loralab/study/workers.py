"""Worker processes of a study: each loads the model once and does the jobs that it is given."""

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
from typing import Any

import torch

from loralab.errors import UserError
from loralab.study.backend import Backend, set_up
from loralab.study.jobs import Job, Reply
from loralab.study.spec import StudySpec
from loralab.training.progress import Line, Progress

REPORT_SECONDS = 0.2  # between two progress messages of a worker


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
