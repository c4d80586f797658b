"""Learning-rate grids: evenly spaced in log lr, the same values before and after widening."""

import math
from dataclasses import dataclass
from typing import Any

MAX_WIDENINGS = 2
POINTS_PER_WIDENING = 2


def three_digits(value: float) -> float:
    """Return `value` rounded to three significant digits."""
    return float(f"{value:.2e}")


@dataclass(frozen=True)
class Grid:
    """Points indexed by whole numbers: 0 to n - 1 at first, further out after widening.

    Point i depends on i alone, so a widened grid keeps every value it had.

    Args:
        start: point 0 before the shift; unused when `values` is given.
        stop: the largest allowed value before the shift, inclusive.
        per_decade: points per factor of ten; four as in arXiv 2602.04998.
        values: an explicit ascending list instead; its end steps continue it when it is widened.
        shift: moves the whole grid by so many points.
    """

    start: float = 1e-5
    stop: float = 1e-2
    per_decade: int = 4
    values: tuple[float, ...] = ()
    shift: int = 0

    @property
    def n(self) -> int:
        """Return the number of points before widening."""
        if self.values:
            return len(self.values)
        return 1 + math.floor(math.log10(self.stop / self.start) * self.per_decade + 1e-6)

    def point(self, index: int) -> float:
        """Return the learning rate at `index`, which may lie outside 0 to n - 1."""
        if not self.values:
            exponent = (index + self.shift) / self.per_decade
            return three_digits(self.start * 10**exponent)
        if 0 <= index < self.n:
            return self.values[index]
        end, away = (0, index) if index < 0 else (self.n - 1, index - self.n + 1)
        return three_digits(self.values[end] * self._step(low=index < 0) ** away)

    def _step(self, low: bool) -> float:
        if self.n == 1:
            return float(10 ** (1 / self.per_decade))
        a, b = (0, 1) if low else (self.n - 2, self.n - 1)
        return self.values[b] / self.values[a]

    def points(self, low: int = 0, high: int | None = None) -> list[float]:
        """Return the points at `low` to `high`, both included."""
        return [self.point(i) for i in range(low, (self.n - 1 if high is None else high) + 1)]

    def to_dict(self) -> dict[str, Any] | list[float]:
        """Return what study.toml holds under `lr`."""
        if self.values:
            return list(self.values)
        return {"start": self.start, "stop": self.stop, "per_decade": self.per_decade}
