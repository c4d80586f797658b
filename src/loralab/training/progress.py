"""Progress for people: one line per running pack and a total with time left.

A live display when the stream is a terminal, plain lines every few seconds when it is not, and
nothing at all for `quiet`. Work is counted in slot-steps, so packs of different sizes add up.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self, TextIO

StepCallback = Callable[[int, int, list[float]], None]


@dataclass(eq=False)
class Line:
    """The state of one pack: what is shown of it."""

    name: str
    n_steps: int
    n_slots: int
    step: int = 0
    losses: tuple[float, ...] = ()
    bar: Any = None

    @property
    def note(self) -> str:
        """Return the best loss of the pack and how many slots have left the finite numbers."""
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        lost = len(self.losses) - len(finite)
        parts = [f"best loss {min(finite):.3g}"] if finite else []
        return ", ".join([*parts, *([f"{lost} diverged"] if lost else [])])

    @property
    def where(self) -> str:
        """Return name, step and note; what has no slots makes no steps that count."""
        step = f"step {self.step}/{self.n_steps}" if self.n_slots else "running"
        return f"{self.name}: {step}{f', {self.note}' if self.note else ''}"

    @property
    def ended(self) -> str:
        """Return what is left to say in the end."""
        steps = f"{self.step} steps, " if self.n_slots else ""
        return f"{self.name}: {steps}{self.note or 'done'}"


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

    `pack(...)` begins a pack and returns the callback that `train_pack` takes as `progress`. Where
    several packs run at once, `begin`, `advance` and `end` serve each of them.
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
        self.lines: list[Line] = []
        self.expected = 0.0
        self.done = 0.0
        self._started = self._spoke = clock()
        self._live: Any = None
        self._total: Any = None

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
        """Set the work that is left, that of the running packs counted whole."""
        self.expected = self.done + max(0.0, slot_steps - self.running)
        self._show()

    @property
    def running(self) -> float:
        """Return the slot-steps that running packs have done."""
        return sum(line.step * line.n_slots for line in self.lines)

    def pack(self, name: str, n_steps: int, n_slots: int) -> StepCallback:
        """Begin a pack, ending those before, and return its step callback."""
        self.finish()
        return partial(self.advance, self.begin(name, n_steps, n_slots))

    def begin(self, name: str, n_steps: int, n_slots: int) -> Line:
        """Begin a pack beside those that run."""
        line = Line(name, n_steps, n_slots)
        self.lines.append(line)
        if self._live is not None:
            note = f"{n_slots} trials" if n_slots else ""
            line.bar = self._live.add_task(name, total=n_steps, note=note)
            self._remove_total()  # it stays the last line
            self._total = self._live.add_task("total", total=self.expected or None, note="")
        return line

    def advance(self, line: Line, step: int, n_steps: int, losses: list[float]) -> None:
        """Show that a pack has made steps."""
        self.done += max(0, step - line.step) * line.n_slots
        line.step, line.n_steps, line.losses = step, n_steps, tuple(losses)
        self._show(line)

    def end(self, line: Line) -> None:
        """End a pack, leaving one line that says how it went."""
        self.lines.remove(line)
        self.say(line.ended)
        if self._live is not None:
            self._live.remove_task(line.bar)
            if not self.lines:
                self._remove_total()

    def finish(self) -> None:
        """End all packs."""
        for line in list(self.lines):
            self.end(line)

    def _remove_total(self) -> None:
        if self._total is not None:
            self._live.remove_task(self._total)
        self._total = None

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
        """Return the time left at the pace so far, or None while little is known."""
        if self.done < max(1.0, self.expected / 100) or self.expected <= self.done:
            return None
        return (self.clock() - self._started) * (self.expected - self.done) / self.done

    def _show(self, line: Line | None = None) -> None:
        if self.quiet or not self.lines:
            return
        left = self.seconds_left
        total = "" if left is None else f"{time_text(left)} left"
        if self._live is not None:
            if line is not None:
                note = line.note or f"{line.n_slots} trials"
                self._live.update(line.bar, completed=line.step, total=line.n_steps, note=note)
            whole = max(self.expected, self.done) or None
            self._live.update(self._total, completed=self.done, total=whole, note=total)
        elif self.clock() - self._spoke >= self.interval:
            texts = [each.where for each in self.lines]
            if total:
                texts[-1] += f"; total {100 * self.done / self.expected:.0f} %, {total}"
            self.say("\n".join(texts))


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
