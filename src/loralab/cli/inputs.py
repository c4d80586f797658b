"""What commands share: opening models and tasks, checking output places before work begins."""

import errno
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loralab.errors import UserError
from loralab.training.progress import Progress


def open_model(ref: str, **options: Any) -> tuple[Any, Any]:
    """Return `load_model(ref)`, with a progress line while the tiny base is pre-trained.

    Raises:
        UserError: there is no such model.
    """
    from loralab.models import load_model

    warm_model(ref)
    return load_model(ref, **options)


def warm_model(ref: str) -> None:
    """Pre-train the tiny base, showing progress, if `ref` names one and the cache lacks it."""
    from loralab.models.tiny import RECIPES, tiny_base
    from loralab.references import parse

    recipe = RECIPES.get(parse(ref)[0])
    if recipe is not None:
        with Progress() as progress:
            tiny_base(fractions(progress), recipe)


def fractions(progress: Progress, n_steps: int = 1000) -> Callable[[float, str], None]:
    """Return a callback of (fraction done, message) that drives one line of `progress`."""
    advance = None

    def show(fraction: float, message: str) -> None:
        nonlocal advance
        if advance is None:
            progress.expect(n_steps)
            advance = progress.pack(message, n_steps, 1)
        advance(round(fraction * n_steps), n_steps, [])

    return show


def writable_folder(out: Path) -> Path:
    """Create the folder `out` if it is missing and prove that it can be written.

    Done before the work, so that nothing is computed that cannot be kept.

    Raises:
        UserError: it is a file, or it cannot be created or written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {str(out)!r} is a file, and a folder is needed")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"cannot write in --out {str(out)!r}: {reason}") from error
    return out


def writable_file(path: Path) -> Path:
    """Prove that the file `path` can be written, without changing what is in it.

    Raises:
        UserError: it is a folder, or it cannot be written.
    """
    if path.is_dir():
        raise UserError(f"--out {str(path)!r} is a folder, and a file is needed")
    if not path.exists():
        writable_folder(path.parent)
    elif not os.access(path, os.W_OK):
        raise UserError(f"cannot write --out {str(path)!r}: {os.strerror(errno.EACCES)}")
    return path


def adapter_folder(path: Path) -> Path:
    """Return `path` if it holds an adapter.

    Raises:
        UserError: the folder or its configuration is missing.
    """
    if not path.is_dir():
        raise UserError(f"there is no adapter folder {str(path)!r}")
    if not (path / "adapter_config.json").is_file():
        raise UserError(f"{str(path)!r} holds no adapter: adapter_config.json is missing")
    return path


def mean_and_error(values: Any) -> tuple[float, float | None]:
    """Return the mean of a sequence of numbers and its standard error (None for one number)."""
    numbers = [float(value) for value in values]
    mean = sum(numbers) / len(numbers)
    if len(numbers) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in numbers) / (len(numbers) - 1)
    return mean, math.sqrt(variance / len(numbers))


def tell_notes(*tasks: Any) -> None:
    """Say on stderr what tasks have cut or left out."""
    for note in dict.fromkeys(note for task in tasks for note in getattr(task, "notes", ())):
        print(f"loralab: {note}; DATA?max_length=N sets another length", file=sys.stderr)
