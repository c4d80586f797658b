"""What a command gives back, and how it reaches people and machines."""

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Answer:
    """The result of a command.

    Args:
        data: plain values for `--json`.
        text: the same for people.
        code: the exit code.
    """

    data: Any
    text: str
    code: int = 0


@dataclass(frozen=True, kw_only=True)
class Command:
    """What every command takes."""

    json: bool = False
    """print JSON on stdout and nothing else"""

    def run(self) -> Answer:
        """Do the work; progress and warnings go to stderr."""
        raise NotImplementedError


def plain(value: Any) -> Any:
    """Return `value` as JSON has it; numbers that JSON lacks (NaN, infinity) become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    return str(value)


def show(answer: Answer, as_json: bool) -> None:
    """Print the answer on stdout; characters that its encoding lacks are escaped or replaced."""
    encoding = sys.stdout.encoding or "utf-8"
    if as_json:
        ascii_only = not encoding.lower().startswith("utf")
        data = plain(answer.data)
        print(json.dumps(data, indent=2, ensure_ascii=ascii_only, allow_nan=False))
    elif answer.text:
        print(answer.text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return rows in aligned columns; on a terminal the last column is cut to its width."""
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(widths))]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]
    limit = shutil.get_terminal_size().columns if sys.__stdout__ and _is_terminal() else None
    return "\n".join(line[:limit] for line in lines)


def _is_terminal() -> bool:
    return sys.__stdout__ is not None and sys.__stdout__.isatty()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").rstrip("%x "))
    except ValueError:
        return text == "-"
    return True
