"""References: one string names a model or a data set together with its options.

`$DATA/vit?num_labels=10` is a path and one option. Environment variables are expanded when the
reference is opened, not before, so that a trial's id does not depend on where a machine keeps
its data.
"""

import dataclasses
import hashlib
import json
import os
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from loralab.errors import UserError, near_misses

Spec = TypeVar("Spec")


def parse(ref: str) -> tuple[str, dict[str, Any]]:
    """Return (target, options) of `target?name=value&name=value`.

    Values are read as JSON scalars (`96`, `0.5`, `true`, `null`) and otherwise as text.

    Raises:
        UserError: an option without a value, or an empty target.
    """
    target, _, query = ref.partition("?")
    if not target.strip():
        raise UserError(f"the reference {ref!r} names nothing")
    options: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise UserError(f"the option {part!r} in {ref!r} needs the form name=value")
        options[name] = _scalar(value)
    return target.strip(), options


def file_hash(ref: str) -> str | None:
    """Return a hash of the content of the file that a reference names, None if it names none."""
    path = Path(expand(parse(ref)[0].rpartition(":")[2]))
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def expand(path: str) -> str:
    """Return the path with `~` and environment variables filled in.

    Raises:
        UserError: a variable that is not set.
    """
    full = os.path.expanduser(os.path.expandvars(path))
    if missing := re.search(r"\$\{?(\w+)", full):
        raise UserError(
            f"the environment variable {missing[1]} in {path!r} is not set; set it to a folder"
        )
    return full


def spec_from(cls: type[Spec], options: Mapping[str, Any], owner: str) -> Spec:
    """Return the dataclass filled from options, names and types checked.

    Args:
        owner: what the options belong to, for messages ("task gsm8k").

    Raises:
        UserError: an unknown option or a value of the wrong type.
    """
    hints = get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name, value in options.items():
        if name not in known:
            hint = near_misses(name, known) or f"; it has {', '.join(known)}"
            raise UserError(f"{owner} has no option {name!r}{hint}")
        if not _fits(value, hints[name]):
            raise UserError(
                f"option {name!r} of {owner} must be {spoken(hints[name])}, not {value!r}"
            )
    return cls(**options)


def _scalar(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, list | dict) else value


def _choices(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return get_args(hint) if is_union else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    kinds = _choices(hint)
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return True
    return isinstance(value, tuple(typing.get_origin(k) or k for k in kinds))


def spoken(hint: Any) -> str:
    """Return a type for people, as in "text or nothing"."""
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return " or ".join(names.get(k, "nothing") for k in _choices(hint))
