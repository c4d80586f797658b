"""Exceptions to one sentence and an exit code: the only place that decides either."""

import errno
import json
import os
import sys
import tomllib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loralab.errors import UserError

MISTAKE, FAULT, INTERRUPTED = 2, 1, 130
DEBUG = "LORALAB_DEBUG"

_BY_ERRNO = {
    errno.ENOENT: "{name} does not exist",
    errno.EACCES: "no permission for {name}; choose another place or change its rights",
    errno.EPERM: "no permission for {name}; choose another place or change its rights",
    errno.EROFS: "{name} is on a read-only file system; choose another place",
    errno.ENOSPC: "no space is left on the disk for {name}; free some and run the same command "
    "again, what was computed is kept",
    errno.EDQUOT: "the disk quota is used up at {name}; free some space and run the same command "
    "again, what was computed is kept",
    errno.EISDIR: "{name} is a folder, and a file is needed",
    errno.ENOTDIR: "{name} is inside something that is not a folder",
    errno.EEXIST: "{name} exists already; choose another place",
    errno.ENAMETOOLONG: "the name {name} is too long",
    errno.EFBIG: "{name} would be larger than the file system allows",
}
# Libraries written in Rust and C++ wrap the system's words instead of an errno.
_BY_WORDS = {
    "No space left on device": errno.ENOSPC,
    "database or disk is full": errno.ENOSPC,
    "Permission denied": errno.EACCES,
    "attempt to write a readonly database": errno.EACCES,
    "unable to open database file": errno.EACCES,
    "Read-only file system": errno.EROFS,
}
_EXTRAS = {"peft": "peft", "PIL": "images"}


def report(error: BaseException) -> int:
    """Print one line about `error` on stderr and return the exit code.

    `LORALAB_DEBUG=1` adds the traceback.
    """
    if isinstance(error, BrokenPipeError):
        # The reader of our output has gone; writing more at exit would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if os.environ.get(DEBUG, "") not in ("", "0"):
        traceback.print_exception(error)
    code, sentence = explain(error)
    print(f"loralab: {' '.join(sentence.split())}", file=sys.stderr)
    return code


def explain(error: BaseException) -> tuple[int, str]:
    """Return (exit code, sentence) for an exception."""
    if isinstance(error, UserError):
        return MISTAKE, str(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "stopped; the same command goes on from the last checkpoint"
    for known, tell in _TELLERS:
        if _is_a(error, known) and (sentence := tell(error)):
            return MISTAKE, sentence
    first = " ".join(str(error).split())[:200]
    return FAULT, (
        f"internal error, {type(error).__name__}: {first or 'no message'}; "
        f"set {DEBUG}=1 and run again for the traceback"
    )


def _is_a(error: BaseException, name: str) -> bool:
    """Return whether a class of this name is among the error's; the library is not imported."""
    return any(cls.__name__ == name for cls in type(error).__mro__)


def _os_error(error: Any) -> str | None:
    if error.errno not in _BY_ERRNO:
        return _words(error)
    name = error.filename2 or error.filename
    return _BY_ERRNO[error.errno].format(name=_name(name))


def _name(name: Any) -> str:
    """Return a file's name for people; the file being written if the system gave none."""
    return repr(os.fsdecode(name)) if isinstance(name, str | bytes | Path) else "the output"


def _words(error: Any) -> str | None:
    """Return the sentence for a library's own words about the disk, or None."""
    code = next((code for words, code in _BY_WORDS.items() if words in str(error)), None)
    return None if code is None else _BY_ERRNO[code].format(name="the output")


def _safetensors(error: Any) -> str:
    return _words(error) or f"the safetensors file is unreadable or truncated ({error})"


def _missing_module(error: Any) -> str | None:
    extra = _EXTRAS.get((error.name or "").partition(".")[0])
    return extra and f"this needs {error.name}; pip install 'loralab[{extra}]'"


def _toml(error: tomllib.TOMLDecodeError) -> str:
    return f"malformed TOML: {error}"


def _json(error: json.JSONDecodeError) -> str:
    return f"malformed JSON: {error.msg} (at line {error.lineno}, column {error.colno})"


def _unicode(error: UnicodeDecodeError) -> str:
    return f"a text file is not UTF-8 at byte {error.start}; convert it"


_TELLERS: list[tuple[str, Callable[[Any], str | None]]] = [
    ("TOMLDecodeError", _toml),
    ("JSONDecodeError", _json),
    ("UnicodeDecodeError", _unicode),
    ("ModuleNotFoundError", _missing_module),
    ("OSError", _os_error),
    ("SafetensorError", _safetensors),
    ("OperationalError", _words),
    ("RuntimeError", _words),
]
