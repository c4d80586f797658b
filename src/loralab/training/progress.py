"""Progress for people: one line per pack and a total with time left.

A live display when the stream is a terminal, plain lines every few seconds when it is not, and
nothing at all for `quiet`. Work is counted in slot-steps, so packs of different sizes add up.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TextIO

StepCallback = Callable[[int, int, list[float]], None]


@dataclass
class Line:
    """The state of one pack: what is shown of it."""

    name: str
    n_steps: int
    n_slots: int
    step: int = 0
    losses: tuple[float, ...] = ()

    @property
    def note(self) -> str:
        """Return the best loss of the pack and how many slots have left the finite numbers."""
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        lost = len(self.losses) - len(finite)
        parts = [f"best loss {min(finite):.3g}"] if finite else []
        return ", ".join([*parts, *([f"{lost} diverged"] if lost else [])])


def time_text(seconds: float) -> str:
    """Return seconds for people: "45 s", "3 min 05 s", "2 h 10 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Progress:
    """A context manager that shows what runs.

    Args:
        stream: where to write; standard error by default.
        interval: seconds between two plain lines.
        quiet: show nothing.
        clock: seconds, growing; for tests.

    `pack(...)` begins a pack and returns the callback that `train_pack` takes as `progress`.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        interval: float = 5.0,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream = stream or sys.stderr
        self.interval = interval
        self.quiet = quiet
        self.clock = clock
        self.line: Line | None = None
        self.expected = 0.0
        self.done = 0.0
        self._started = self._spoke = clock()
        self._live: Any = None
        self._tasks: list[Any] = []

    def __enter__(self) -> Self:
        self._started = self._spoke = self.clock()
        if not self.quiet and self.stream.isatty():
            self._live = _live_display(self.stream)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def expect(self, slot_steps: float) -> None:
        """Set the work of the whole run, counted from now; more may be announced later."""
        self.expected = max(self.done + slot_steps, self.done)
        self._show()

    def pack(self, name: str, n_steps: int, n_slots: int) -> StepCallback:
        """Begin a pack, ending the one before, and return its step callback."""
        self.finish()
        line = self.line = Line(name, n_steps, n_slots)
        if self._live is not None:
            self._tasks = [
                self._live.add_task(name, total=n_steps, note=f"{n_slots} trials"),
                self._live.add_task("total", total=self.expected or None, note=""),
            ]

        def advance(step: int, n_steps: int, losses: list[float]) -> None:
            self.done += max(0, step - line.step) * line.n_slots
            line.step, line.n_steps, line.losses = step, n_steps, tuple(losses)
            self._show()

        return advance

    def finish(self) -> None:
        """End the current pack, leaving one line that says how it went."""
        if self.line is not None:
            self.say(f"{self.line.name}: {self.line.step} steps, {self.line.note or 'done'}")
        if self._live is not None:
            for task in self._tasks:
                self._live.remove_task(task)
        self._tasks, self.line = [], None

    def say(self, text: str) -> None:
        """Write one line that stays."""
        if self.quiet:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)
            self._spoke = self.clock()

    @property
    def seconds_left(self) -> float | None:
        """Return the time left at the pace so far, or None while nothing is known."""
        if not self.done or self.expected <= self.done:
            return None
        return (self.clock() - self._started) * (self.expected - self.done) / self.done

    def _show(self) -> None:
        line = self.line
        if self.quiet or line is None:
            return
        left = self.seconds_left
        total = "" if left is None else f"{time_text(left)} left"
        if self._live is not None:
            pack, whole = self._tasks
            note = line.note or f"{line.n_slots} trials"
            self._live.update(pack, completed=line.step, total=line.n_steps, note=note)
            self._live.update(
                whole, completed=self.done, total=max(self.expected, self.done) or None, note=total
            )
        elif self.clock() - self._spoke >= self.interval:
            share = f"; total {100 * self.done / self.expected:.0f} %, {total}" if total else ""
            note = f", {line.note}" if line.note else ""
            self.say(f"{line.name}: step {line.step}/{line.n_steps}{note}{share}")


def _live_display(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        console=Console(file=stream),
        refresh_per_second=4,
    )
