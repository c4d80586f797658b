"""Reading a TOML table with one clear sentence for every mistake."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from loralab.errors import UserError, near_misses

_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    list: "a list",
    dict: "a table",
}


def kind_name(value: object) -> str:
    """Return what a TOML value is, in words."""
    for kind, words in _KINDS.items():
        if type(value) is kind:
            return words
    return type(value).__name__


class Table:
    """One table of a spec. Keys are taken one by one; `finish` refuses those that are left.

    Args:
        source: the file's name, for messages.
        path: where this table stands in the file, such as "methods[2]".
    """

    def __init__(self, data: Mapping[str, Any], source: str, path: str = "") -> None:
        self.data = dict(data)
        self.source = source
        self.path = path
        self.known: set[str] = set()

    def fail(self, key: str, message: str) -> NoReturn:
        """Raise the UserError `source: path.key message`."""
        where = f"{self.path}.{key}" if self.path and key else self.path or key
        raise UserError(f"{self.source}: {where} {message}")

    def take(self, key: str, default: Any = None) -> Any:
        """Return the raw value of `key`, marking it as known."""
        self.known.add(key)
        return self.data.get(key, default)

    def has(self, key: str) -> bool:
        """Return whether the file gives `key`."""
        self.known.add(key)
        return key in self.data

    def check_number(
        self, key: str, value: Any, low: float, high: float = math.inf, above: bool = False
    ) -> float:
        """Return `value` as a finite float in [low, high], or (low, high] if `above`."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(key, f"must be a number, not {kind_name(value)}")
        if not math.isfinite(value):
            self.fail(key, f"must be finite, not {value}")
        if value < low or value > high or (above and value == low):
            bound = f"above {low:g}" if above else f"at least {low:g}"
            upper = f" and at most {high:g}" if math.isfinite(high) else ""
            self.fail(key, f"must be {bound}{upper}, not {value:g}")
        return float(value)

    def check_whole(self, key: str, value: Any, low: int) -> int:
        """Return `value` as an int of at least `low`."""
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(key, f"must be a whole number, not {_shown(value)}")
        if value < low:
            self.fail(key, f"must be at least {low}, not {value}")
        return value

    def check_text(self, key: str, value: Any) -> str:
        """Return `value` as a text that is not empty."""
        if not isinstance(value, str):
            self.fail(key, f"must be a text in quotes, not {kind_name(value)}")
        if not value.strip():
            self.fail(key, "must not be empty")
        return value

    def number(
        self, key: str, default: float, low: float, high: float = math.inf, above: bool = False
    ) -> float:
        """Return a finite number within bounds."""
        return self.check_number(key, self.take(key, default), low, high, above)

    def whole(self, key: str, default: int | None, low: int) -> int | None:
        """Return a whole number of at least `low`, or None if it has no value."""
        value = self.take(key, default)
        return None if value is None else self.check_whole(key, value, low)

    def text(self, key: str, default: str) -> str:
        """Return a text that is not empty."""
        return self.check_text(key, self.take(key, default))

    def choice(self, key: str, default: str, choices: Iterable[str]) -> str:
        """Return one of `choices`."""
        value, known = self.text(key, default), list(choices)
        if value not in known:
            self.fail(
                key, f"must be {' or '.join(known)}, not {value!r}{near_misses(value, known)}"
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self.take(key, default)
        if not isinstance(value, bool):
            self.fail(key, f"must be true or false, not {kind_name(value)}")
        return value

    def wholes(self, key: str, default: list[int], low: int) -> tuple[int, ...]:
        """Return distinct whole numbers; a single number counts as a list of one."""
        value = self.take(key, default)
        values = value if isinstance(value, list) else [value]
        if not values:
            self.fail(key, "must not be empty")
        checked = tuple(self.check_whole(key, item, low) for item in values)
        if len(set(checked)) < len(checked):
            self.fail(key, "names a value twice")
        return checked

    def table(self, key: str) -> "Table":
        """Return the table under `key`, empty if it is not given."""
        value = self.take(key, {})
        if not isinstance(value, Mapping):
            self.fail(key, f"must be a table, not {kind_name(value)}")
        return Table(value, self.source, f"{self.path}.{key}" if self.path else key)

    def finish(self) -> None:
        """Refuse the first key that nobody asked for."""
        for key in self.data:
            if key not in self.known:
                self.fail(key, f"is not a known key{near_misses(key, self.known)}")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else kind_name(value)
