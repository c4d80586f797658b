import errno
import json
import tomllib

import pytest

from loralab.cli.errors import explain


def raised(action):
    try:
        action()
    except Exception as error:
        return error


def missing_extra():
    raise ModuleNotFoundError("No module named 'PIL'", name="PIL.Image")


class SafetensorError(Exception):
    """Named as the library's own, which is written in Rust and found by its name."""


class OperationalError(Exception):
    """Named as SQLAlchemy's."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), "'a.txt' does not exist"),
        (PermissionError(errno.EACCES, "denied", b"a.txt"), "no permission for 'a.txt'"),
        (OSError(errno.EROFS, "read-only", "a.txt"), "read-only file system"),
        (OSError(errno.ENOSPC, "full"), "no space is left on the disk for the output"),
        (IsADirectoryError(errno.EISDIR, "dir", "a"), "'a' is a folder"),
        (SafetensorError("Error while deserializing header: header too large"), "truncated"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "no space is left"),
        (OperationalError("(sqlite3.OperationalError) database or disk is full"), "no space"),
        (OperationalError("attempt to write a readonly database"), "no permission"),
        (raised(lambda: tomllib.loads("a = = 1")), "line 1, column 5"),
        (raised(lambda: json.loads("{\n x")), "line 2, column 2"),
        (raised(lambda: b"\xff".decode()), "not UTF-8 at byte 0"),
        (raised(missing_extra), "pip install 'loralab[images]'"),
    ],
)
def test_known_errors_are_the_users_and_say_where(error, words):
    code, sentence = explain(error)
    assert code == 2 and words in sentence


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), RuntimeError("shape mismatch"), OSError("odd"), OperationalError("no column")],
)
def test_other_errors_are_ours(error):
    code, sentence = explain(error)
    assert code == 1 and type(error).__name__ in sentence
