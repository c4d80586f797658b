"""One process per study, and one sentence when the disk refuses."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from loralab.errors import UserError

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the study's lock, which the system releases even after kill -9.

    Raises:
        UserError: another process runs this study.
    """
    try:
        import fcntl
    except ImportError:  # Windows: SQLite's own lock still keeps the store whole
        yield
        return
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is running the study in {folder}") from None
        yield


@contextlib.contextmanager
def readable_disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk or missing permission into one sentence."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise UserError(_disk_sentence(folder, os.strerror(error.errno))) from error
    except SafetensorError as error:
        if not any(f"os error {code}" in str(error) for code in _DISK):
            raise
        raise UserError(_disk_sentence(folder, str(error))) from error


def _disk_sentence(folder: Path, cause: str) -> str:
    return (
        f"cannot write in {folder}: {cause}; what is stored already stays, "
        "mend the cause and run again"
    )


def check_at_least_one(**numbers: int | None) -> None:
    """Raise UserError unless each number that is given is at least 1."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {number}")
