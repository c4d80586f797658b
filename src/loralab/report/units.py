"""How numbers are written for people: scores, gains, learning rates, ratios, sizes, times."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

DASH = "–"


@dataclass(frozen=True)
class Unit:
    """The unit of a metric: shares of one are shown as percentages, everything else as it is."""

    metric: str
    higher_is_better: bool
    percent: bool

    @classmethod
    def of(cls, metric: str, higher_is_better: bool, values: Iterable[float]) -> "Unit":
        """Choose percentages where higher is better and every value lies in [0, 1]."""
        finite = [v for v in values if math.isfinite(v)]
        percent = higher_is_better and bool(finite) and all(0 <= v <= 1 for v in finite)
        return cls(metric or "score", higher_is_better, percent)

    @property
    def sign(self) -> float:
        """Return 1 if higher is better, else -1."""
        return 1.0 if self.higher_is_better else -1.0

    @property
    def factor(self) -> float:
        """Return what a stored value is multiplied by for display."""
        return 100.0 if self.percent else 1.0

    @property
    def axis(self) -> str:
        """Return the axis title."""
        suffix = " (%)" if self.percent else ""
        return f"{self.metric}{suffix}" + ("" if self.higher_is_better else ", lower is better")

    @property
    def digits(self) -> int:
        """Return the number of decimals of a displayed score."""
        return 1 if self.percent else 3

    def value(self, x: float) -> str:
        """Return a score, such as "71.3" (per cent) or "0.412"."""
        return number(x * self.factor, self.digits)

    def gap(self, x: float) -> str:
        """Return a difference with its sign, such as "+0.8" or "−0.012"."""
        return signed(x * self.factor, self.digits)

    def size(self, x: float) -> str:
        """Return a magnitude in words, such as "1 point", "2.5 points" or "0.010 nats"."""
        shown = f"{abs(x) * self.factor:.{self.digits}f}"
        if self.percent and shown.endswith(".0"):
            shown = shown[:-2]
        return f"{shown} {self._noun(shown)}".rstrip()

    def _noun(self, shown: str) -> str:
        if self.percent:
            return "point" if shown == "1" else "points"
        return "nats" if "nll" in self.metric.lower() else ""


def number(x: float | None, digits: int = 1) -> str:
    """Return x with `digits` decimals, or a dash if it is missing."""
    return DASH if x is None or not math.isfinite(x) else f"{x:.{digits}f}".replace("-", "−")


def signed(x: float, digits: int = 1) -> str:
    """Return x with a sign; what rounds to zero has none."""
    if not math.isfinite(x):
        return DASH
    text = f"{x:+.{digits}f}"
    if float(text) == 0:
        text = text[1:]
    return text.replace("-", "−")


def rate(lr: float | None) -> str:
    """Return a learning rate, such as "1.8e-3"."""
    if lr is None or not math.isfinite(lr) or lr <= 0:
        return DASH
    mantissa, exponent = f"{lr:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def factor(x: float) -> str:
    """Return a factor with two significant digits, such as "8.1" or "18"."""
    if not math.isfinite(x):
        return DASH
    return f"{x:.2g}" if x < 99.5 else f"{x:.0f}"


def times(ratio: float) -> str:
    """Return a ratio of rates in words: "8.0 times less" or "3.2 times more"."""
    return f"{factor(1 / ratio)} times less" if ratio < 1 else f"{factor(ratio)} times more"


def count(n: float) -> str:
    """Return a count with a thousands prefix, such as "12.3 k"."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g} {prefix}"
    return f"{n:.0f}"


def amount(n_bytes: float) -> str:
    """Return bytes as "12 MB" or "1.4 GB" (decimal)."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Return seconds as "4.2 s", "3 min 05 s" or "2 h 10 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plural(n: int, noun: str) -> str:
    """Return "1 seed" or "3 seeds"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def listing(names: Iterable[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
