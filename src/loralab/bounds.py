"""What a hyper-parameter may be, said in its type: `beta1: Decay = 0.9`, `k: Count | None = None`.

Every piece checks its fields against their types when it is made; a piece adds a check of its own
only for what concerns several fields together.
"""

import math
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from loralab.errors import UserError, near_misses


@dataclass(frozen=True)
class Bound:
    """A range: the words for it, and whether a number lies in it (NaN and infinity never do)."""

    words: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class OneOf:
    """One of the keys of a table, such as a choice of formulas; `Literal` where there is none."""

    known: Iterable[str]


Finite = Annotated[float, Bound("a finite number", math.isfinite)]
Positive = Annotated[float, Bound("positive", lambda v: 0 < v < math.inf)]
NonNegative = Annotated[float, Bound("at least 0", lambda v: 0 <= v < math.inf)]
AtLeastOne = Annotated[float, Bound("at least 1", lambda v: 1 <= v < math.inf)]
Decay = Annotated[float, Bound("in [0, 1)", lambda v: 0 <= v < 1)]
Share = Annotated[float, Bound("a share, in [0, 1]", lambda v: 0 <= v <= 1)]
SomeShare = Annotated[float, Bound("a share, above 0 and at most 1", lambda v: 0 < v <= 1)]
PartShare = Annotated[float, Bound("a share, at least 0 and below 1", lambda v: 0 <= v < 1)]
InnerShare = Annotated[float, Bound("a share, above 0 and below 1", lambda v: 0 < v < 1)]
Count = Annotated[int, Bound("a whole number from 1 on", lambda v: v >= 1)]
CountOrZero = Annotated[int, Bound("a whole number from 0 on", lambda v: v >= 0)]


def check_fields(piece: Any) -> None:
    """Raise UserError if a field of a dataclass is not what its type says."""
    for name, hint in _hints(type(piece)).items():
        value, choices = getattr(piece, name), _choices(hint)
        if value is None and type(None) in choices:
            continue
        what = f"{name} of {type(piece).__name__}"
        for choice in choices:
            if get_origin(choice) is Literal:
                _check_known(what, value, get_args(choice))
            elif get_origin(choice) is Annotated:
                _check_bound(what, value, *get_args(choice))


def bound_words(piece: Any, name: str) -> str:
    """Return what the type says of a field beyond its kind, or an empty string."""
    choices = _choices(_hints(type(piece))[name])
    found = [words for choice in choices if (words := _words(choice))]
    return "; ".join([*found, *(["None"] if found and type(None) in choices else [])])


def is_optional(piece: Any, name: str) -> bool:
    """Return whether a field may be None."""
    return type(None) in _choices(_hints(type(piece))[name])


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _SEEN:
        hints = get_type_hints(cls, include_extras=True)
        _SEEN[cls] = {field.name: hints[field.name] for field in fields(cls)}
    return _SEEN[cls]


_SEEN: dict[type, dict[str, Any]] = {}


def _choices(hint: Any) -> tuple[Any, ...]:
    is_union = get_origin(hint) in (types.UnionType, typing.Union)
    return get_args(hint) if is_union else (hint,)


def _words(choice: Any) -> str:
    if get_origin(choice) is Literal:
        return _listed(get_args(choice))
    if get_origin(choice) is Annotated:
        bound = get_args(choice)[1]
        return bound.words if isinstance(bound, Bound) else _listed(bound.known)
    return ""


def _check_bound(what: str, value: Any, kind: type, bound: Bound | OneOf) -> None:
    if isinstance(bound, OneOf):
        _check_known(what, value, bound.known)
        return
    kinds = (int, float) if kind is float else (kind,)
    if isinstance(value, bool) or not isinstance(value, kinds) or not bound.holds(value):
        raise UserError(f"{what} must be {bound.words}, not {value!r}")


def _check_known(what: str, value: Any, known: Iterable[Any]) -> None:
    if value not in known:
        hint = near_misses(value, map(str, known)) if isinstance(value, str) else ""
        raise UserError(f"{what} cannot be {value!r}{hint or f'; it is {_listed(known)}'}")


def _listed(known: Iterable[Any]) -> str:
    *most, last = map(repr, known)
    return f"{', '.join(most)} or {last}" if most else last
