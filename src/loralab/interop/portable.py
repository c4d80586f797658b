"""An adapter apart from its model: what a folder holds, between files and a Pack."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from loralab.core.bank import PAST, START, Bank
from loralab.core.context import Context
from loralab.core.layers import Weight, frozen_weight, layer_kind
from loralab.core.pack import Pack, SlotSpec
from loralab.core.starts import group_of, places
from loralab.core.targets import matches_suffix
from loralab.errors import UserError
from loralab.recipe import Evidence, Site, Start, Tensors

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
        config=describe(model, pack),
        foreign=dict(adapter.foreign_config),
        layers={n: _layer(m) for n, m in modules.items()},
        weights={n: frozen_weight(m) for n, m in modules.items()},
    )


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


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def describe(model: nn.Module, pack: Pack) -> dict[str, Any]:
    """Return the keys of adapter_config.json that say nothing about tensors."""
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
