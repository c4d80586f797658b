"""Which layers to adapt: names in, module names out, with near misses when nothing matches."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from loralab.core.layers import is_linear, layer_kind
from loralab.errors import UserError, near_misses

T = TypeVar("T")


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the output head: what the model says it is, or a trailing `classifier`/`score`."""
    getter = getattr(model, "get_output_embeddings", None)
    if getter is not None:
        try:
            head = getter()
        except (NotImplementedError, AttributeError):
            head = None
        if isinstance(head, nn.Module):
            return head
    for name in ("lm_head", "classifier", "score", "head"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Module):
            return head
    return None


def beside_head(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the names of modules that are not part of the output head."""
    head = output_head(model)
    inside = set(head.modules()) if head is not None else set()
    return [n for n in names if model.get_submodule(n) not in inside]


def adaptable_names(model: nn.Module) -> list[str]:
    """Return the names of all layers that can be adapted, in module order.

    Projections inside `nn.MultiheadAttention` are left out: it reads their weights without
    calling them, so an adapter there would have no effect.
    """
    silent = silent_names(model)
    return [n for n, m in model.named_modules() if layer_kind(m) and n not in silent]


def silent_names(model: nn.Module) -> set[str]:
    """Return the names of modules whose parameters others read without calling them."""
    return {
        f"{name}.{child}" if name else child
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for child, _ in module.named_modules()
        if child
    }


def resolve_targets(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Return the module names that `targets` selects, in module order.

    Args:
        targets: "all-linear" (every Linear and Conv1D but the output head); a list of suffixes
            ("q_proj") or full names, of Embedding and Conv2d layers as well; or one string, read
            as a suffix or else as a regular expression that must match the whole name.

    Raises:
        UserError: nothing matches, or one entry of a list matches nothing.
    """
    candidates = adaptable_names(model)
    if targets == "all-linear":
        linear = [n for n in candidates if is_linear(model.get_submodule(n))]
        if not linear:
            raise UserError(
                "the model has no nn.Linear or Conv1D layer to adapt; name others in targets"
            )
        return beside_head(model, linear) or linear
    if not candidates:
        raise UserError("the model has no Linear, Conv1D, Conv2d or Embedding layer to adapt")
    if isinstance(targets, str):
        return _by_string(targets, candidates)
    chosen_set: set[str] = set()
    for target in targets:
        found = [n for n in candidates if matches_suffix(n, target)]
        if not found:
            raise UserError(_nothing(target, candidates))
        chosen_set.update(found)
    if not chosen_set:
        raise UserError("targets is an empty list; name layers or write 'all-linear'")
    return [n for n in candidates if n in chosen_set]


def matches_suffix(name: str, suffix: str) -> bool:
    """Return whether `suffix` is the whole name or its last dotted components."""
    return name == suffix or name.endswith("." + suffix)


def by_pattern(name: str, patterns: Mapping[str, T] | None, default: T) -> T:
    """Return the value of the first pattern (suffix or regular expression) that fits `name`."""
    for pattern, value in (patterns or {}).items():
        if matches_suffix(name, pattern) or _full_match(pattern, name):
            return value
    return default


def check_patterns(patterns: Mapping[str, object] | None, names: Sequence[str], what: str) -> None:
    """Raise UserError when a pattern of `rank_pattern` or `alpha_pattern` fits no target."""
    for pattern in patterns or {}:
        if not any(matches_suffix(n, pattern) or _full_match(pattern, n) for n in names):
            raise UserError(f"{what} entry {_nothing(pattern, names)}")


def _by_string(target: str, candidates: list[str]) -> list[str]:
    found = [n for n in candidates if matches_suffix(n, target)]
    found = found or [n for n in candidates if _full_match(target, n)]
    if not found:
        raise UserError(_nothing(target, candidates))
    return found


def _full_match(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _nothing(target: str, candidates: Sequence[str]) -> str:
    endings = {n.rsplit(".", 1)[-1] for n in candidates} | set(candidates)
    hint = near_misses(target, sorted(endings)) or f"; layers are named like {candidates[0]!r}"
    return f"target {target!r} matches no layer of the model that can be adapted{hint}"
