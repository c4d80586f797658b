"""Words to a command's dataclass through tyro, with every mistake told in one sentence."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any, get_type_hints

import tyro

from loralab.errors import UserError, near_misses
from loralab.references import spoken

_CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName)


def parse(cls: type, prog: str, words: Sequence[str]) -> Any:
    """Return an instance of the dataclass `cls` from command-line words.

    Raises:
        UserError: an unknown or missing option, or a value that does not fit.
        SystemExit: after `--help`, with code 0.
    """
    for word, value in zip(words, [*words, None][1:], strict=True):
        flag = word.removesuffix("=")
        if flag.startswith("--") and flag != "--prompt" and (value == "" or word != flag):
            raise UserError(f"{flag} has an empty value; an unset shell variable is one reason")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(cls, prog=prog, args=list(words), config=_CONFIG)
    except SystemExit as stop:
        if not stop.code:
            raise
    raise UserError(_sentence(cls, prog, words, complaint.getvalue()))


def _sentence(cls: type, prog: str, words: Sequence[str], complaint: str) -> str:
    flags, positional = _options(cls)
    known = [*flags, "--help"]
    for word in words:
        name = word.split("=")[0].replace("_", "-")
        if word.startswith("--") and name not in known:
            hint = near_misses(name, known) or f"; see `{prog} --help`"
            return f"`{prog}` has no option {name}{hint}"
    given = {word.split("=")[0].replace("_", "-") for word in words}
    missing = [flag for flag, needed in flags.items() if needed and flag not in given]
    text = _unbox(complaint)
    if text.startswith("Missing from") and (missing or positional):
        return f"`{prog}` needs {' and '.join(missing or positional)}; see `{prog} --help`"
    if text.startswith("Unrecognized options"):
        extra = text.split(":", 1)[1].strip().split(", ")[0]
        return f"`{prog}` does not know what to do with {extra!r}; see `{prog} --help`"
    if wrong := re.match(r"Error parsing (--[\w-]+): ", text):
        hint = get_type_hints(cls)[wrong[1][2:].replace("-", "_")]
        split = [part for word in words for part in word.split("=", 1)]
        last = dict(zip((flag.replace("_", "-") for flag in split), split[1:], strict=False))
        value = last[wrong[1]]  # the last one, if it is given twice
        return f"{wrong[1]} must be {spoken(hint).removesuffix(' or nothing')}, not {value!r}"
    text = re.sub(r", 'None'|'None', ", "", text)
    return f"{text}; see `{prog} --help`"


def _options(cls: type) -> tuple[dict[str, bool], list[str]]:
    """Return {flag: whether it must be given} and the positional arguments that must be."""
    hints = get_type_hints(cls, include_extras=True)
    flags, positional = {}, []
    for field in dataclasses.fields(cls):
        needed = field.default is dataclasses.MISSING
        if _is_positional(hints[field.name]):
            positional += [field.name.upper()] * needed
        else:
            flags["--" + field.name.replace("_", "-")] = needed
    return flags, positional


def _is_positional(hint: Any) -> bool:
    """Return whether tyro reads this annotation by place."""
    marks = getattr(tyro.conf.Positional[str], "__metadata__", ())
    return any(mark in marks for mark in getattr(hint, "__metadata__", ()))


def _unbox(complaint: str) -> str:
    """Return the first paragraph of tyro's message without its frame and title.

    The frame is drawn with box characters, or with spaces and dashes where the terminal has none.
    """
    body: list[str] = []
    for i, line in enumerate(filter(None, (raw.strip("│ ") for raw in complaint.splitlines()))):
        is_rule = not line.strip("─-╰╯")
        if i == 0 or (is_rule and not body):
            continue
        if is_rule:
            break
        body.append(line)
    return re.sub(r"\s+", " ", " ".join(body)).strip().rstrip(".")
