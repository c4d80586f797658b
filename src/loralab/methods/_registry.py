"""Names to methods: registration, discovery, lookup."""

import importlib
import pkgutil
import re
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points

from loralab.errors import UserError, near_misses
from loralab.methods import _docstring
from loralab.recipe import (
    Form,
    Method,
    NoSchedule,
    OwnStart,
    Recipe,
    Rule,
    Schedule,
    Start,
    plain_rule,
)

ENTRY_POINTS = "loralab.methods"
AXES = (
    "expansion", "sharing", "budgeting", "optimization", "initialization", "experts", "baseline"
)  # fmt: skip

KINDS = (Form, Start, Rule, Schedule)

_METHODS: dict[str, Method] = {}
_NAMES: dict[str, str] = {}  # every name and alias, to the method's name
_walked = False


def key(name: str) -> str:
    """Return the registry's spelling of `name`: "LoRA-GA" is "lora_ga", "lora+" is "lora_plus"."""
    return name.strip().lower().replace("+", "_plus").replace("-", "_").replace(" ", "_")


def register(
    name: str,
    axis: str,
    doc: str | None,
    form: Form,
    *,
    start: Start | None = None,
    rule: Rule | None = None,
    schedule: Schedule | None = None,
    aliases: Sequence[str] = (),
) -> Method:
    """Add a method to the catalogue and return it.

    Args:
        axis: the taxonomy's axis, which is also the folder.
        doc: the docstring of the method's file, with its fields (`_docstring`).
        form, start, rule, schedule: its pieces; what is left out is LoRA's.
        aliases: other names under which the method is found.

    Raises:
        UserError: a name, an axis or a piece that is none, a name or an alias that another method
            has, or a docstring that lacks a field.
    """
    if axis not in AXES:
        hint = near_misses(axis, AXES) or f"; one of {', '.join(AXES)}"
        raise UserError(f"unknown axis {axis!r} of method {name!r}{hint}")
    if not re.fullmatch(r"[a-z]\w*", key(name), re.ASCII):
        raise UserError(f"a method's name has letters, digits and underscores, unlike {name!r}")
    if isinstance(aliases, str):
        raise UserError(f"aliases of method {name!r} are a list of names, unlike {aliases!r}")
    recipe = Recipe(form, start or OwnStart(), rule or plain_rule(), schedule or NoSchedule())
    for (kind, piece), cls in zip(recipe.pieces.items(), KINDS, strict=True):
        if not isinstance(piece, cls):
            raise UserError(f"the {kind} of method {name!r} is no {cls.__name__}, but {piece!r}")
    found = _docstring.fields(name, doc)
    return add(
        Method(
            name=name,
            axis=axis,
            recipe=recipe,
            paper=_docstring.paper(name, found),
            summary=found["summary"][0],
            equation=found["equation"][0],
            traps=tuple(found.get("trap", ())),
            aliases=aliases,
        )
    )


def add(method: Method) -> Method:
    """Add `method` to the catalogue and return it.

    Raises:
        UserError: another method already has this name or one of these aliases.
    """
    names = [key(name) for name in (method.name, *method.aliases)]
    for name in names:
        owner = _NAMES.get(name)
        if owner is not None and _METHODS[owner] != method:
            raise UserError(f"method name {name!r} is taken by {owner!r}; choose another name")
    for name in names:
        _NAMES[name] = names[0]
    _METHODS[names[0]] = method
    return method


def all_methods() -> dict[str, Method]:
    """Return every method by name, sorted by axis and name."""
    _walk()
    return dict(sorted(_METHODS.items(), key=lambda item: (item[1].axis, item[0])))


def get(name: str) -> Method:
    """Return the method called `name` (case, "-" for "_" and "+" for "_plus" do not matter).

    Raises:
        UserError: no such method; the message lists near misses.
    """
    _walk()
    if not isinstance(name, str):
        raise UserError(f"a method is called by name, not by {name!r}")
    if key(name) not in _NAMES:
        hint = near_misses(key(name), _NAMES) or "; `loralab methods` lists them all"
        raise UserError(f"unknown method {name!r}{hint}")
    return _METHODS[_NAMES[key(name)]]


def _walk() -> None:
    """Import every module below this package, and every plug-in, once."""
    global _walked
    if _walked:
        return
    _walked = True
    package = importlib.import_module(__package__)
    try:
        for module in pkgutil.walk_packages(package.__path__, f"{__package__}."):
            importlib.import_module(module.name)
    except UserError:  # somebody had taken a name of ours before
        _walked = False
        raise
    for point in entry_points(group=ENTRY_POINTS):
        try:
            found = point.load()
        except Exception as error:
            warnings.warn(f"method plug-in {point.name!r} was skipped: {error}", stacklevel=2)
            continue
        if isinstance(found, Method):
            add(found)
