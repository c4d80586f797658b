"""An adapter apart from its model: what a folder holds, between files and a Pack."""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loralab.core.bank import PAST, START, Bank
from loralab.core.context import Context
from loralab.core.layers import Weight, frozen_weight, layer_kind
from loralab.core.pack import Pack, SlotSpec
from loralab.core.starts import group_of, places
from loralab.core.targets import adaptable_names, matches_suffix, resolve_targets
from loralab.errors import UserError, near_misses
from loralab.recipe import Evidence, Form, Site, Start, Tensors

if TYPE_CHECKING:
    from loralab.core.adapter import Adapter

Size = tuple[int, int]  # outputs, inputs
BASE_NEEDED = (
    "this adapter's files do not tell the update without the base's weights or sizes; load it on "
    "its base with loralab.load and save or export it from there"
)
KEPT = ("base_model_name_or_path", "task_type")  # from a file, where the model does not say them


@dataclass(frozen=True)
class Layer:
    """What the layout of a file depends on: the layer's kind, a Conv2d's kernel, whether it has a
    bias.
    """

    kind: str = "Linear"
    kernel: tuple[int, int] = (1, 1)
    bias: bool = False


@dataclass(frozen=True)
class Portable:
    """One adapter without its model.

    Attributes:
        sites: per adapted layer its tensors without pack axes: the Form's own by name, what an
            anchored update is measured from as name + START, folded restarts as `PAST`.
        shared: the tensors that all sites share.
        whole: per module trained whole its parameters by name.
        sizes: (outputs, inputs) per site, None where a file does not tell.
        config: keys of adapter_config.json that say nothing about tensors.
        foreign: keys of a loaded adapter_config.json that are kept as they are.
        layers: what else is known of the layers; absent ones are plain Linear layers.
        start_again: the file has no anchor; it is what the Start makes of the base.
        finish: makes the sites' tensors of the file's where that needs the sizes of the layers or
            their order in the model.
        base: weights of the base that the file repeats; they must be the model's.
        weights: the base weights [out, in], where the model is at hand.
    """

    spec: SlotSpec
    method: str
    sites: dict[str, Tensors]
    shared: Tensors
    whole: dict[str, Tensors]
    sizes: Mapping[str, Size | None]
    config: dict[str, Any]
    foreign: dict[str, Any] = field(default_factory=dict)
    layers: Mapping[str, Layer] = field(default_factory=dict)
    start_again: bool = False
    finish: Callable[[dict[str, Tensors], dict[str, Size]], dict[str, Tensors]] | None = None
    base: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Weight] = field(default_factory=dict)

    def layer(self, name: str) -> Layer:
        """Return what is known of a site's layer."""
        return self.layers.get(name, Layer())

    @property
    def kinds(self) -> set[str]:
        """Return the kinds of the adapted layers."""
        return {self.layer(name).kind for name in self.sites}

    @property
    def needs_base(self) -> bool:
        """Return whether the files alone do not tell the update."""
        reads = "W" in self.spec.recipe.form.reads and not self.weights
        unknown = self.finish is not None or None in self.sizes.values()
        return self.start_again or reads or unknown

    def count_parameters(self) -> int:
        """Return the number of trained numbers."""
        form, rule = self.spec.recipe.form, self.spec.recipe.rule
        tensors = [*self.whole.values()]
        for own in (*self.sites.values(), self.shared):
            names = [n for n in own if n not in form.frozen and n not in PAST and rule.trains(n)]
            tensors.append({n: own[n] for n in names if not n.endswith(START)})
        return sum(t.numel() for own in tensors for t in own.values())

    def bank(self, name: str) -> Bank:
        """Return a bank of one for a site.

        Raises:
            UserError: the layer's sizes are unknown without the base.
        """
        size = self.sizes[name]
        if size is None or self.needs_base:
            raise UserError(BASE_NEEDED)
        own = self.sites[name]
        tensors = {n: t[None] for n, t in own.items() if n not in PAST and not n.endswith(START)}
        shared = self.spec.recipe.form.shared
        tensors |= {n: self.shared[shared_key(self.spec, name, n)][None] for n in shared}
        recipe = replace(self.spec.recipe, start=Blank(any(n.endswith(START) for n in own)))
        site = Site(
            name,
            size[1],
            size[0],
            self.spec.rank_at(name),
            asked=self.spec.asked_at(name),
            has_bias=self.layer(name).bias,
            **places(self.sites)[name],
        )
        like = next(iter(tensors.values()))
        bank = Bank(recipe, site, tensors, like.new_tensor([self.spec.scale_at(name)]), 0.0)
        for n, t in own.items():
            if n in PAST or n.endswith(START):
                bank._buffers[n] = t[None]
        if "W" in recipe.form.reads:
            bank.context = Context(self.weights[name])
        return bank


@dataclass(frozen=True)
class Blank(Start):
    """Stands in for a Start whose tensors come from a file."""

    pair_only = False
    anchored: bool = False

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Replace nothing."""
        return {}


def from_adapter(adapter: "Adapter") -> Portable:
    """Return copies of an adapter's tensors with what is needed to write them."""
    pack = adapter.pack
    spec, model = pack.slots[0], pack.model
    modules = {n: model.get_submodule(n) for n in pack.names}
    sites: dict[str, Tensors] = {}
    shared: Tensors = {}
    for name, site in zip(pack.names, pack.sites, strict=True):
        bank = site.banks[0]
        sites[name] = _tensors(bank)
        shared |= {
            shared_key(spec, name, n): _copy(getattr(bank, n)[0])
            for n in bank.names
            if n in bank.form.shared
        }
    return Portable(
        spec=spec,
        method=adapter.method,
        sites=sites,
        shared=shared,
        whole={
            name: {n: _copy(getattr(whole, n)[0]) for n in whole.names}
            for name, whole in zip(pack.whole_names, pack.whole, strict=True)
        },
        sizes={n: (*frozen_weight(m).shape,) for n, m in modules.items()},  # type: ignore[misc]
        config=_describe(model, pack),
        foreign=dict(adapter.foreign_config),
        layers={n: _layer(m) for n, m in modules.items()},
        weights={n: frozen_weight(m) for n, m in modules.items()},
    )


def onto(model: nn.Module, portable: Portable) -> "Adapter":
    """Attach to `model` and return the Adapter.

    Raises:
        UserError: a layer is absent from the model or has other sizes.
    """
    from loralab.core.adapter import Adapter

    _check_names(model, portable)
    _check_base(model, portable)
    if portable.finish is not None:
        names = [n for n, _ in model.named_modules() if n in portable.sites]
        shapes = {n: frozen_weight(model.get_submodule(n)).shape for n in names}
        sizes = {n: (shape[0], shape[1]) for n, shape in shapes.items()}
        portable = replace(portable, sites=portable.finish(portable.sites, sizes))
    spec = portable.spec
    recipe = replace(spec.recipe, form=_any_rank(spec.recipe.form))
    if not portable.start_again:
        recipe = replace(recipe, start=Blank(recipe.start.anchored))
    slot = replace(spec, recipe=recipe, targets=_targets(model, portable))
    # Where data or training decided on the tensors' sizes, the file alone knows them.
    own_sizes = spec.recipe.form.needs or spec.site_ranks
    pack = Pack(model, [slot], ready=portable.sites if own_sizes else None)
    try:
        _fill(pack, portable)
    except BaseException:
        pack.close()
        raise
    # The pack keeps the targets as they were asked for, so that saving again says the same.
    asked = _targets(model, portable) if _is_foreign(model, portable) else spec.targets
    pack.slots = [replace(spec, targets=asked)]
    adapter = Adapter(pack, portable.method)
    told = _describe(model, pack)
    kept = {k: v for k, v in portable.config.items() if k in KEPT and v and k not in told}
    adapter.foreign_config = {**portable.foreign, **kept}
    return adapter


def shared_key(spec: SlotSpec, site: str, tensor: str) -> str:
    """Return the name under which a tensor that `site` shares with others is written."""
    scope = spec.recipe.form.shared[tensor]
    return tensor if scope == "model" else f"{group_of(site, scope, spec.site_groups)}.{tensor}"


def _layer(module: nn.Module) -> Layer:
    kind, bias = layer_kind(module) or "", getattr(module, "bias", None) is not None
    kernel = module.kernel_size if isinstance(module, nn.Conv2d) else (1, 1)
    return Layer(kind, kernel, bias)  # type: ignore[arg-type]


def _tensors(bank: Bank) -> Tensors:
    found = {n: getattr(bank, n) for n in bank.names if n not in bank.form.shared}
    if bank.anchored:
        found |= {n + START: getattr(bank, n + START) for n in bank.trained}
    found |= {n: getattr(bank, n) for n in PAST if getattr(bank, n) is not None}
    return {n: _copy(t[0]) for n, t in found.items()}


def _any_rank(form: Form) -> Form:
    """Return the Form without the limit on ranks, which is advice for new adapters.

    An anchored adapter that PEFT turned into a pair of rank 2r may well be above it.
    """
    free = copy.copy(form)
    object.__setattr__(free, "any_rank", True)
    return free


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _describe(model: nn.Module, pack: Pack) -> dict[str, Any]:
    config = getattr(model, "config", None)
    base = getattr(config, "_name_or_path", None) or None
    said = {"base_model_name_or_path": base, "task_type": _task_type(model, pack.whole_names)}
    return {
        **{key: value for key, value in said.items() if value is not None},
        "target_modules": _shortest(model, pack.names, pack.whole_names),
        "modules_to_save": list(pack.whole_names) or None,
        "inference_mode": True,
    }


def _task_type(model: nn.Module, whole: list[str]) -> str | None:
    """Return PEFT's task type where PEFT then builds what this adapter is."""
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    # For this one PEFT expects the head in the file, whatever modules_to_save says.
    if name.endswith("ForSequenceClassification") and {"classifier", "score"} & set(whole):
        return "SEQ_CLS"
    return None


def _shortest(model: nn.Module, names: list[str], whole: list[str]) -> list[str]:
    """Return suffixes that select `names` and nothing else in PEFT's reading, or full names."""
    endings = sorted({n.rsplit(".", 1)[-1] for n in names})
    hit = {
        n
        for n, _ in model.named_modules()
        if any(matches_suffix(n, e) for e in endings) and n not in whole
    }
    return endings if hit == set(names) else list(names)


def _check_names(model: nn.Module, portable: Portable) -> None:
    modules = dict(model.named_modules())
    known = adaptable_names(model)
    for name in portable.sites:
        if name not in modules:
            hint = near_misses(name, known, n=1) or f"; its layers are named like {known[:1]}"
            raise UserError(f"the adapter's layer {name!r} is not in the model{hint}")
        if layer_kind(modules[name]) is None:
            kind = type(modules[name]).__name__
            raise UserError(f"layer {name!r} is a {kind} here, which cannot be adapted")
        shape, size = tuple(frozen_weight(modules[name]).shape), portable.sizes[name]
        if size is not None and size != shape:
            raise UserError(
                f"layer {name!r} is {shape[0]} x {shape[1]} in the model and {size[0]} x "
                f"{size[1]} in the adapter; it was trained on another base"
            )
    for name, tensors in portable.whole.items():
        if name not in modules:
            hint = near_misses(name, modules, n=1)
            raise UserError(f"the adapter's trained module {name!r} is not in the model{hint}")
        own = dict(modules[name].named_parameters(recurse=False))
        for leaf, tensor in tensors.items():
            if leaf not in own or own[leaf].shape != tensor.shape:
                raise UserError(
                    f"{name}.{leaf} is {list(tensor.shape)} in the adapter and "
                    f"{list(own[leaf].shape) if leaf in own else 'absent'} in the model"
                )


def _check_base(model: nn.Module, portable: Portable) -> None:
    """Raise UserError where the file says what the base must be, and it is not."""
    own = dict(model.named_parameters())
    for name, tensor in portable.base.items():
        same = name in own and own[name].shape == tensor.shape
        if not (same and torch.equal(own[name].detach().cpu(), tensor.to(own[name].dtype))):
            raise UserError(
                f"the adapter's file brings a {name} of its own, which is not the model's: the "
                "base was changed (new tokens, say); change the model likewise and save it anew"
            )


def _targets(model: nn.Module, portable: Portable) -> str | tuple[str, ...]:
    """Return targets that select exactly the file's sites (and modules trained whole)."""
    if not _is_foreign(model, portable):
        return portable.spec.targets
    for tried in (portable.spec.targets, tuple(portable.sites)):
        if _select(model, tried) == set(portable.sites):
            return tried
    return "(?:" + "|".join(re.escape(n) for n in portable.sites) + ")"


def _is_foreign(model: nn.Module, portable: Portable) -> bool:
    """Return whether the spec's own targets select other layers here than the file has."""
    chosen = _select(model, portable.spec.targets)
    return chosen is None or chosen - set(portable.whole) != set(portable.sites)


def _select(model: nn.Module, targets: str | tuple[str, ...]) -> set[str] | None:
    try:
        return set(resolve_targets(model, targets))
    except UserError:
        return None


@torch.no_grad()
def _fill(pack: Pack, portable: Portable) -> None:
    for name, site in zip(pack.names, pack.sites, strict=True):
        bank, said = site.banks[0], portable.sites[name]
        for n in bank.names:
            if n in bank.form.shared:
                key = shared_key(portable.spec, name, n)
                _put(name, n, getattr(bank, n), {n: portable.shared.get(key)})  # type: ignore
            else:
                _put(name, n, getattr(bank, n), said)
        if portable.start_again:
            continue
        starts = [n for n in said if n.endswith(START)]
        for n in starts:
            _put(name, n, bank._buffers[n], said)
        bank.anchored = bool(starts)
        for n in PAST:
            if n in said:
                setattr(bank, n, said[n][None].to(bank.scale))
    for name, whole in zip(pack.whole_names, pack.whole, strict=True):
        for leaf in whole.names:
            _put(name, leaf, getattr(whole, leaf), portable.whole[name])


def _put(layer: str, name: str, to: Tensor | None, source: Tensors) -> None:
    if to is None or source.get(name) is None:
        raise UserError(f"the adapter's files have no tensor {name} for layer {layer!r}")
    if source[name].shape != to.shape[1:]:
        raise UserError(
            f"tensor {name} of layer {layer!r} is {list(source[name].shape)} in the adapter's file "
            f"and must be {list(to.shape[1:])} for this model"
        )
    to.copy_(source[name][None])
