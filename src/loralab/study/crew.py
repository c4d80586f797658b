"""Who does the jobs of a study: this process, or several that load the model once each.

On two cores two processes of one thread each are faster and steadier than one process of two
threads, because one step of a small model has too little work to share. Only the parent writes the
store and shows progress.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Protocol

import torch

from loralab.study import search
from loralab.study.backend import Bench
from loralab.study.jobs import Job, Reply
from loralab.study.probe import WORKER_BYTES, model_bytes
from loralab.study.workers import Order, Workers
from loralab.training.memory import available_bytes
from loralab.training.progress import Progress


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
    """
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
