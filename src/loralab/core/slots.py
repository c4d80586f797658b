"""What each slot of a pack is, and which layers of a model that means."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from torch import nn

from loralab.core.coded import coded
from loralab.core.layers import frozen_weight, layer_kind
from loralab.core.targets import (
    by_pattern,
    check_patterns,
    matches_suffix,
    resolve_targets,
    silent_names,
)
from loralab.errors import UserError, near_misses
from loralab.recipe import Recipe


@dataclass(frozen=True)
class SlotSpec:
    """One adapter of a pack.

    Args:
        alpha: None takes the Form's default for the rank.
        targets, rank_pattern, alpha_pattern: see `loralab.adapt`.
        modules_to_train: names of modules trained whole beside the adapter.
        site_ranks: ranks by full name that a Start or a Schedule chose; 0 leaves the layer out.
        site_scales: s by full name, where the rank has changed since s was fixed.
        site_groups: sharing groups by full name that a Start chose.
    """

    recipe: Recipe
    rank: int = 8
    alpha: float | None = None
    seed: int = 0
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    modules_to_train: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    site_ranks: Mapping[str, int] = field(default_factory=dict)
    site_scales: Mapping[str, float] = field(default_factory=dict)
    site_groups: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, pattern in (("rank", self.rank_pattern), ("alpha", self.alpha_pattern)):
            if not isinstance(pattern, Mapping) or not all(isinstance(k, str) for k in pattern):
                raise UserError(f"{what}_pattern maps names to {what}s, unlike {pattern!r}")
        for rank in (self.rank, *self.rank_pattern.values()):
            if not isinstance(rank, Integral) or isinstance(rank, bool):
                raise UserError(f"rank must be a whole number, not {rank!r}")
            if rank < 1:
                raise UserError(f"rank must be at least 1, not {rank}")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if alpha is not None and not (_is_number(alpha) and 0 < alpha < math.inf):
                raise UserError(f"alpha must be a positive number, not {alpha!r}")
        if not isinstance(self.seed, Integral) or isinstance(self.seed, bool):
            raise UserError(f"seed must be a whole number, not {self.seed!r}")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise UserError(f"dropout must lie in [0, 1), not {self.dropout!r}")
        for what in ("targets", "modules_to_train"):
            names = getattr(self, what)
            if not isinstance(names, str) and not all(isinstance(n, str) for n in names):
                raise UserError(f"{what} are names of layers, unlike {names!r}")

    def rank_at(self, name: str) -> int:
        """Return the rank at a site."""
        return self.site_ranks.get(name, self.asked_at(name))

    def asked_at(self, name: str) -> int:
        """Return the rank that the user asked for at a site."""
        return by_pattern(name, self.rank_pattern, self.rank)

    def scale_at(self, name: str) -> float:
        """Return s at a site."""
        if name in self.site_scales:
            return self.site_scales[name]
        rank, form = self.rank_at(name), self.recipe.form
        alpha = by_pattern(name, self.alpha_pattern, self.alpha)
        return form.scale(form.default_alpha(rank) if alpha is None else alpha, rank)

    @property
    def bank_key(self) -> tuple:
        """Return what neighbouring slots must have in common to share banks."""
        r, pattern = self.recipe, tuple(sorted(self.rank_pattern.items()))
        pieces = (r.form, r.start.anchored, r.rule, r.schedule)
        ranks, groups = (tuple(sorted(m.items())) for m in (self.site_ranks, self.site_groups))
        return (*pieces, self.rank, pattern, ranks, groups, self.targets, self.dropout)

    def names(self, model: nn.Module) -> list[str]:
        """Return the layers this slot adapts, in module order.

        Raises:
            UserError: a target or pattern fits nothing, or a rank is larger than a layer.
        """
        names = resolve_targets(model, self.targets)
        check_patterns(self.rank_pattern, names, "rank_pattern")
        check_patterns(self.alpha_pattern, names, "alpha_pattern")
        names = [n for n in names if self.rank_at(n) > 0]
        for name in names:
            self._check_layer(name, model.get_submodule(name))
        return names

    def _check_layer(self, name: str, module: nn.Module) -> None:
        form, kind = self.recipe.form, layer_kind(module)
        if kind not in form.layers:
            raise UserError(
                f"layer {name!r} is a {kind}, and the formula of {type(form).__name__} is for "
                f"{', '.join(sorted(form.layers))}; leave it out of targets"
            )
        smaller, rank = min(frozen_weight(module).shape), self.rank_at(name)
        if rank > smaller and not form.any_rank:
            raise UserError(
                f"rank {rank} is larger than layer {name!r} allows "
                f"({smaller}, its smaller side); choose a rank of at most {smaller} or give "
                "that layer its own with rank_pattern"
            )


def stretches(slots: Sequence[SlotSpec]) -> list[tuple[int, int]]:
    """Return (lo, hi) of neighbouring slots that share banks."""
    ends = [i for i in range(1, len(slots)) if slots[i].bank_key != slots[i - 1].bank_key]
    return list(zip([0, *ends], [*ends, len(slots)], strict=True))


def whole_modules(model: nn.Module, slots: Sequence[SlotSpec]) -> dict[str, list[int]]:
    """Return {module name: slots that train it whole}, in module order.

    Raises:
        UserError: an entry of `modules_to_train` is no module, has no parameters of its own, or
            is quantised.
    """
    order = {n: i for i, (n, _) in enumerate(model.named_modules()) if n}
    found: dict[str, list[int]] = {}
    silent = silent_names(model)
    for k, spec in enumerate(slots):
        for wanted in spec.modules_to_train:
            names = [n for n in order if matches_suffix(n, wanted)]
            if not names:
                hint = near_misses(wanted, [n.rsplit(".", 1)[-1] for n in order])
                raise UserError(f"modules_to_train entry {wanted!r} is no module{hint}")
            for name in names:
                if name in silent:
                    raise UserError(
                        f"modules_to_train entry {wanted!r} means {name!r}, whose weights its "
                        "attention reads without calling it; train the whole attention instead"
                    )
                if coded(model.get_submodule(name)) is not None:
                    raise UserError(
                        f"modules_to_train entry {wanted!r} means {name!r}, whose weight is "
                        "quantised and cannot be trained; leave it out when you quantise"
                    )
                if not list(model.get_submodule(name).parameters(recurse=False)):
                    raise UserError(
                        f"modules_to_train entry {wanted!r} has no parameters of its own; "
                        "name the layers inside it"
                    )
                found.setdefault(name, []).append(k)
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
