"""A type of PEFT's as a declaration: the keys, the tensors' names, and how each is laid out."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from loralab.core.pack import SlotSpec
from loralab.errors import UserError
from loralab.interop.peft_type import (
    PeftType,
    View,
    alpha_at,
    as_number,
    check_rank,
    common,
    conv1d_layers,
    fits,
    need,
    spec_of,
    value_at,
)
from loralab.interop.portable import Layer, Portable, Size
from loralab.methods import build
from loralab.recipe import Tensors

Whole = dict[str, Tensors]
Sites = dict[str, Tensors]


class Table(PeftType):
    """One method whose tensors are PEFT's but for names, order of axes and unit axes.

    Attributes:
        method: ours.
        tensors: our name to "PEFT's name: axes here -> axes there"; axes are letters (m outputs,
            n inputs, r the rank), 1 a unit axis. Tensors that an adapter lacks are passed over.
        settings: hyper-parameters of our method by PEFT's key.
        fixed: what PEFT's other switches must say.
        rank: PEFT's key; empty where the tensors alone tell.
        alpha: PEFT's key and default; empty where PEFT has none, and s goes into `scaled`.
        patterns: whether PEFT has rank_pattern and alpha_pattern.
        dropout: PEFT's key.
        more: PEFT's keys that `config` and `options` speak of.
        elsewhere: further names in PEFT's files, for `_in` to look at.
        projections: our name to PEFT's of tensors that all layers share.
        kinds: of layer on which PEFT computes the same.
    """

    method: ClassVar[str]
    tensors: ClassVar[Mapping[str, str]]
    settings: ClassVar[Mapping[str, str]] = {}
    fixed: ClassVar[Mapping[str, Any]] = {}
    rank: ClassVar[str] = "r"
    alpha: ClassVar[tuple[str, float] | None] = None
    scaled: ClassVar[str] = ""
    patterns: ClassVar[bool] = False
    dropout: ClassVar[str] = ""
    more: ClassVar[tuple[str, ...]] = ()
    elsewhere: ClassVar[tuple[str, ...]] = ()
    projections: ClassVar[Mapping[str, str]] = {}
    kinds: ClassVar[frozenset[str]] = frozenset({"Linear"})

    def __init_subclass__(cls) -> None:
        names = tuple(_parts(text)[0] for text in cls.tensors.values())
        cls.suffixes = (*names, *cls.elsewhere)
        own = (cls.rank, cls.alpha[0] if cls.alpha else "", cls.dropout, *cls.fixed)
        patterns = ("rank_pattern", "alpha_pattern") if cls.patterns else ()
        cls.keys = (*(k for k in own if k), *cls.settings, *patterns, *cls.more)

    # What a subclass may say beside the table.

    def allows(self, portable: Portable) -> bool:
        """Return whether PEFT can express the settings."""
        return True

    def config(self, portable: Portable) -> dict[str, Any]:
        """Return further keys."""
        return {}

    def options(self, config: dict[str, Any], sites: Sites) -> dict[str, Any]:
        """Return further hyper-parameters of our method from PEFT's files."""
        return {}

    def there(self, own: Tensors, portable: Portable, site: str) -> Tensors:
        """Return our tensors as PEFT's formula wants them, axes and names still ours."""
        return own

    def here(self, own: Tensors, portable: Portable, site: str) -> Tensors:
        """Undo `there`, for the portable whose form is known."""
        return own

    def finish(self, config: dict[str, Any]) -> Any:
        """Return `Portable.finish`."""
        return None

    def size(self, own: Tensors, axes: dict[str, int]) -> Size | None:
        """Return (outputs, inputs) of a site, if the tensors tell."""
        return (axes["m"], axes["n"]) if {"m", "n"} <= axes.keys() else None

    def layers(self, config: dict[str, Any], sites: Sites) -> dict[str, Layer]:
        """Return what PEFT's files tell of the layers."""
        return conv1d_layers(config, sites)

    # The machinery.

    def view(self, portable: Portable) -> View | None:
        spec = portable.spec
        if not fits(portable, self.method, self.kinds):
            return None
        config = self._rank_keys(portable) if self.allows(portable) else None
        if config is None:
            return None
        form = spec.recipe.form
        config |= {key: getattr(form, name) for key, name in self.settings.items()}
        config |= {self.dropout: spec.dropout} if self.dropout else {}
        if "Conv1D" in self.kinds:
            config["fan_in_fan_out"] = "Conv1D" in portable.kinds
        config |= {"peft_type": self.name, **self.fixed, **self.config(portable)}
        sites = {n: self._out(own, portable, n) for n, own in portable.sites.items()}
        return View(config, sites, {p: portable.shared[o] for o, p in self.projections.items()})

    def _rank_keys(self, portable: Portable) -> dict[str, Any] | None:
        spec, names = portable.spec, list(portable.sites)
        rank, ranks = common({n: spec.rank_at(n) for n in names})
        alpha, alphas = common({n: as_number(alpha_at(spec, n)) for n in names})
        scales = {spec.scale_at(n) for n in names}
        uneven = (ranks and self.rank) or (alphas and self.alpha)
        if uneven and not self.patterns:
            return None
        if not self.alpha and not self.scaled and scales != {1.0}:
            return None
        found: dict[str, Any] = {self.rank: rank} if self.rank else {}
        if self.alpha:
            found[self.alpha[0]] = alpha
        if self.patterns:
            found["rank_pattern"] = ranks
            found |= {"alpha_pattern": alphas} if self.alpha else {}
        return found

    def _out(self, own: Tensors, portable: Portable, site: str) -> Tensors:
        own = self.there(own, portable, site)
        scale = portable.spec.scale_at(site)
        if self.scaled and scale != 1.0:
            own = {**own, self.scaled: own[self.scaled] * scale}
        return {
            peft: moved(own[ours], here, there)
            for ours, text in self.tensors.items()
            if ours in own
            for peft, here, there in [_parts(text)]
        }

    def _in(self, said: Tensors, site: str) -> Tensors:
        """Return PEFT's tensors under our names, in our axes.

        Raises:
            UserError: all are missing.
        """
        found = {}
        for ours, text in self.tensors.items():
            peft, here, there = _parts(text)
            if peft in said:
                found[ours] = moved(said[peft], there, here)
        need(said, [p for p in self.suffixes if not found][:1], site)
        return found

    def site_back(self, said: Tensors, portable: Portable, site: str) -> Tensors:
        own = self._in(said, site)
        if self.scaled and portable.spec.scale_at(site) != 1.0:
            own.pop(self.scaled, None)  # rounded by the scale: the file has ours beside it
        return self.here(own, portable, site)

    def read(self, config: dict[str, Any], sites: Sites, shared: Tensors, whole: Whole) -> Portable:
        for key, value in self.fixed.items():
            if config.get(key, value) != value:
                raise UserError(
                    f"this {self.name} adapter has {key}={config[key]!r}, which cannot be run here"
                )
        own = {n: self._in(t, n) for n, t in sites.items()}
        axes = {n: self._axes(t) for n, t in own.items()}
        ranks = {n: self._rank(config, n, axes[n]) for n in own}
        said = {name: config[key] for key, name in self.settings.items() if key in config}
        recipe = build(self.method, **{**said, **self.options(config, sites)})
        alphas = None
        if self.alpha:
            key, default = self.alpha
            pattern, alpha = config.get("alpha_pattern"), config.get(key, default)
            alphas = {n: float(value_at(pattern, n, alpha)) for n in own}
        dropout = float(config.get(self.dropout) or 0.0)
        spec: SlotSpec = spec_of(recipe, config, ranks, alphas, dropout, whole)
        sizes = {n: self.size(t, axes[n]) for n, t in own.items()}
        shared = self._shared(shared)
        finish = self.finish(config)
        portable = Portable(
            spec,
            self.method,
            own,
            shared,
            whole,
            sizes,
            {},
            layers=self.layers(config, sites),
            finish=finish,
        )
        return replace(portable, sites={n: self.here(t, portable, n) for n, t in own.items()})

    def shared_back(self, said: Tensors, portable: Portable) -> Tensors:
        return self._shared(said)

    def _shared(self, said: Tensors) -> Tensors:
        if missing := [peft for peft in self.projections.values() if peft not in said]:
            raise UserError(
                f"the adapter's files have no {missing[0]}; save it from PEFT with "
                "save_projection=True"
            )
        return {ours: said[peft] for ours, peft in self.projections.items()}

    def _axes(self, own: Tensors) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, tensor in own.items():
            here = _parts(self.tensors[name])[1]
            if tensor.dim() != len(here):
                raise ValueError(f"tensor {name} has {tensor.dim()} axes, not {len(here)}")
            found |= dict(zip(here, tensor.shape, strict=True))
        return found

    def _rank(self, config: dict[str, Any], name: str, axes: dict[str, int]) -> int:
        if self.rank and self.rank in config:
            pattern = config.get("rank_pattern") if self.patterns else None
            said = int(value_at(pattern, name, config[self.rank]))
            return check_rank(said, axes.get("r", said), name)
        return axes.get("r", 8)


def moved(t: Tensor, here: list[str], there: list[str]) -> Tensor:
    """Return t, whose axes are named `here`, with the axes `there`; 1 is a unit axis."""
    kept = [a for a in there if a != "1"]
    sizes = dict(zip(here, t.shape, strict=True))
    t = t.reshape([sizes[a] for a in here if a != "1"])
    order = [[a for a in here if a != "1"].index(a) for a in kept]
    return t.permute(order).reshape([1 if a == "1" else sizes[a] for a in there])


def _parts(text: str) -> tuple[str, list[str], list[str]]:
    """Return (PEFT's name, axes here, axes there) of an entry of `Table.tensors`."""
    name, _, axes = text.partition(": ")
    here, _, there = axes.partition(" -> ")
    return name, here.split(), (there or here).split()
