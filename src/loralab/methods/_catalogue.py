"""The catalogue as plain data, and the questions that one asks of it."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from loralab.bounds import bound_words
from loralab.errors import UserError, near_misses
from loralab.methods._build import KINDS
from loralab.methods._registry import all_methods
from loralab.recipe import LAYERS, Method

HELD_OUT = "held-out split"


def methods(
    axis: str | None = None,
    *,
    piece: str | None = None,
    mergeable: bool | None = None,
    needs_data: bool | None = None,
    layer: str | None = None,
    max_params: float | None = None,
    max_memory: float | None = None,
) -> list[dict[str, Any]]:
    """Return the catalogue as plain data, also callable as `loralab.methods()`.

    Args:
        axis: keep the methods of this axis only.
        piece: keep those with this piece: a class ("PiSSA"), or kind and class ("start=PiSSA");
            case and underscores do not matter.
        mergeable: whether the update can be merged into the base weight.
        needs_data: whether it looks at data beyond its training batches: gradients or inputs
            before it starts, or a held-out split.
        layer: keep those that adapt this kind of layer: Linear, Conv1D, Conv2d or Embedding.
        max_params: the most trained numbers, in multiples of LoRA's, as `loralab.cost` counts.
        max_memory: the most memory in training, in multiples of LoRA's, as `loralab.cost`
            measures it on one layer.

    Returns:
        One dictionary per method: name, aliases, axes, pieces (class names), settings
        ("piece.field" to default), bounds ("piece.field" to what it may be, in words), layers,
        mergeable, needs, paper, summary, equation, traps.

    Raises:
        UserError: no method has this axis or piece, there is no such kind of layer, or a limit
            is not positive.
    """
    known = all_methods().values()
    if axis is not None:
        axis = _known("axis", axis, {method.axis for method in known})
    if layer is not None:
        layer = _known("kind of layer", layer, LAYERS)
    wanted = None if piece is None else _piece(piece)
    for what, most in (("max_params", max_params), ("max_memory", max_memory)):
        if most is not None and not most > 0:
            raise UserError(f"{what} is a multiple of LoRA's, so it must be positive, not {most}")
    lora = all_methods()["lora"]
    found = []
    for method in known:
        keep = (
            axis in (None, method.axis)
            and (layer is None or layer in method.recipe.form.layers)
            and (wanted is None or bool(wanted & _spelled(method)))
            and mergeable in (None, _mergeable(method))
            and needs_data in (None, bool(_needs(method)))
            and (max_params is None or _params(method) <= max_params * _params(lora))
            and (max_memory is None or _memory(method) <= max_memory * _memory(lora))
        )
        if keep:
            found.append(_row(method))
    return found


def _row(method: Method) -> dict[str, Any]:
    pieces = method.recipe.pieces
    settings = [
        (f"{kind}.{field.name}", piece, field.name)
        for kind, piece in pieces.items()
        for field in dataclasses.fields(piece)
    ]
    return {
        "name": method.name,
        "aliases": list(method.aliases),
        "axes": [method.axis],
        "pieces": {kind: type(piece).__name__ for kind, piece in pieces.items()},
        "settings": {name: getattr(piece, field) for name, piece, field in settings},
        "bounds": {
            n: words for n, piece, field in settings if (words := bound_words(piece, field))
        },
        "layers": sorted(method.recipe.form.layers),
        "mergeable": _mergeable(method),
        "needs": _needs(method),
        "paper": dataclasses.asdict(method.paper),
        "summary": method.summary,
        "equation": method.equation,
        "traps": list(method.traps),
    }


def _mergeable(method: Method) -> bool:
    from loralab.core.bank import mergeable

    return mergeable(method.recipe.form)


def _needs(method: Method) -> list[str]:
    """Return the evidence that the pieces look at before training, and whether data is held out."""
    recipe = method.recipe
    needs = sorted(recipe.form.needs | recipe.start.needs)
    held_out = bool(recipe.rule.held_out) or recipe.schedule.held_out
    return needs + [HELD_OUT] * held_out


def _params(method: Method) -> int:
    from loralab.cost import measure

    return measure(method.recipe).n_trained


def _memory(method: Method) -> int:
    from loralab.cost import memory

    return memory(method.recipe)


def _known(what: str, value: str, known: Iterable[str]) -> str:
    """Return the known name that `value` spells."""
    by_plain = {_plain(name): name for name in sorted(known)}
    if _plain(value) not in by_plain:
        hint = near_misses(_plain(value), by_plain)
        for plain, name in by_plain.items():
            hint = re.sub(rf"\b{plain}\b", name, hint)
        few = f"; one of {', '.join(by_plain.values())}" if len(by_plain) < 10 else ""
        hint = hint or few or "; `loralab show METHOD` names a method's pieces"
        raise UserError(f"unknown {what} {value!r}{hint}")
    return by_plain[_plain(value)]


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "").replace("-", "").replace("+", "plus")


def _spelled(method: Method) -> set[tuple[str, str]]:
    """Return (kind, plain class name) of each piece."""
    return {(kind, _plain(type(p).__name__)) for kind, p in method.recipe.pieces.items()}


def _piece(words: str) -> set[tuple[str, str]]:
    """Return the (kind, plain class name) pairs that "PiSSA" or "start=PiSSA" may mean."""
    kind, equals, name = words.rpartition("=")
    kinds = [_known("kind of piece", {"init": "start"}.get(kind, kind), KINDS)] if equals else KINDS
    classes = {
        type(method.recipe.pieces[kind]).__name__
        for method in all_methods().values()
        for kind in kinds
    }
    plain = _plain(_known(" ".join(["piece", *([kind] if equals else [])]), name, classes))
    return {(kind, plain) for kind in kinds}
