"""A method's name and the user's changes, to a Recipe."""

import dataclasses
from typing import Any

from loralab.bounds import is_optional
from loralab.errors import UserError, near_misses
from loralab.methods._compatible import refusals
from loralab.methods._registry import all_methods, get
from loralab.recipe import Form, Recipe, Rule, Schedule, Start

KINDS: dict[str, type] = {"form": Form, "start": Start, "rule": Rule, "schedule": Schedule}
_ALIASES = {"init": "start"}
PEFT_WORDS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "modules_to_save": "modules_to_train",
    "init_lora_weights": "init",
}


def build(name: str | Recipe, **swaps_and_settings: Any) -> Recipe:
    """Return the recipe of method `name` with pieces swapped and hyper-parameters set.

    Args:
        name: the method's name, or a recipe to begin with.
        swaps_and_settings: `form`, `init` (or `start`), `rule`, `schedule`: a piece, or the name of
            a method that brings one; anything else is a hyper-parameter of one of the pieces by
            field name, or as "piece.field" where two pieces have the same field.

    Raises:
        UserError: unknown method or hyper-parameter, a value of the wrong type, or pieces that
            cannot meet.
    """
    pieces = dict((name if isinstance(name, Recipe) else get(name).recipe).pieces)
    name = "recipe" if isinstance(name, Recipe) else name
    settings = {}
    for word, value in swaps_and_settings.items():
        kind = _ALIASES.get(word, word)
        if kind in KINDS:
            if kind != word and kind in swaps_and_settings:
                raise UserError(f"{word} and {kind} are two words for one piece; give one of them")
            pieces[kind] = _piece(kind, value)
        else:
            settings[word] = value
    changes: dict[str, dict[str, Any]] = {}  # all of a piece at once: it may check them together
    for word, value in settings.items():
        kind, field = _owner(name, pieces, word)
        changes.setdefault(kind, {})[field.name] = _fit(name, word, value, pieces[kind], field)
    pieces |= {kind: dataclasses.replace(pieces[kind], **new) for kind, new in changes.items()}
    return check(Recipe(**pieces))


def check(recipe: Recipe) -> Recipe:
    """Return `recipe` if its pieces can meet.

    Raises:
        UserError: they cannot; the sentence names the two pieces and the reason.
    """
    for refusal in refusals(recipe):
        raise UserError(refusal.sentence)
    return recipe


def _piece(kind: str, value: Any) -> Any:
    """Return the piece itself, or the one that the named method brings."""
    if isinstance(value, KINDS[kind]):
        return value
    if not isinstance(value, str):
        raise UserError(
            f"{kind} must be a {KINDS[kind].__name__} or a method's name, not {value!r}"
        )
    plain = all_methods()["lora"]
    method = get(value)
    piece = method.recipe.pieces[kind]
    if method is not plain and piece == plain.recipe.pieces[kind]:
        owners = [m.name for m in all_methods().values() if m.recipe.pieces[kind] != piece]
        raise UserError(
            f"method {method.name!r} brings no {kind} of its own; these do: {', '.join(owners)} "
            f"(and 'lora' gives the plain one)"
        )
    return piece


def _owner(name: str, pieces: dict[str, Any], word: str) -> tuple[str, Any]:
    """Return which piece, and which of its fields, `word` sets."""
    fields = {(kind, f.name): f for kind in pieces for f in dataclasses.fields(pieces[kind])}
    kind, _, rest = word.partition(".")
    kind = _ALIASES.get(kind, kind)
    found = [at for at in fields if (at == (kind, rest) if rest else at[1] == word)]
    if len(found) > 1:
        spelled = " or ".join(repr(f"{k}.{f}") for k, f in found)
        raise UserError(f"{word!r} of method {name!r} is ambiguous; write {spelled}")
    if not found:
        known = sorted({f for _, f in fields})
        words = [*known, *KINDS, *_ALIASES]
        hint = near_misses(word, words) or f"; it has {', '.join(known) or 'none'}"
        if word in PEFT_WORDS:
            hint = f"; PEFT's {word} is called {PEFT_WORDS[word]} here"
        raise UserError(f"method {name!r} has no hyper-parameter {word!r}{hint}")
    return found[0][0], fields[found[0]]


def _fit(name: str, word: str, value: Any, piece: Any, field: dataclasses.Field[Any]) -> Any:
    """Return `value` in the type of the present value; None only where the field allows it."""
    present = getattr(piece, field.name)
    optional = present is None or is_optional(piece, field.name)
    if present is None or (value is None and optional) or type(value) is type(present):
        return value
    if isinstance(present, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    whole = isinstance(value, float) and value.is_integer()
    if isinstance(present, int) and not isinstance(present, bool) and whole:
        return int(value)
    raise UserError(
        f"hyper-parameter {word!r} of method {name!r} is a {type(present).__name__} "
        f"(default {present!r}), not {value!r}"
    )
