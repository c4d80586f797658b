"""Portable adapters to PEFT's files and back.

What PEFT can express is written under PEFT's own type and keys. Tensors of ours that cannot be
read back to the bit from PEFT's keys (where an anchored start began, say) stand beside them under
`loralab_*` keys, which PEFT passes over; what PEFT cannot express has these keys alone and
`"peft_type": "LORALAB"`.
"""

import dataclasses
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from loralab import __version__
from loralab.core.files import Folder
from loralab.core.record import spec_from_json, spec_to_json
from loralab.errors import UserError, near_misses
from loralab.interop import peft_frames, peft_tables
from loralab.interop.peft_lora import Lora
from loralab.interop.peft_shared import RandLora, TinyLora
from loralab.interop.peft_type import PeftType, View
from loralab.interop.peft_types import AdaLora, GraLora
from loralab.interop.portable import BASE_NEEDED, Layer, Portable
from loralab.recipe import Tensors

ROOT, PREFIX, OURS = "base_model.", "base_model.model.", "loralab_"
OWN_TYPE = "LORALAB"
# In the order in which they are tried: the type made for a Form before the general one.
TYPES: dict[str, PeftType] = {
    t.name: t
    for t in (
        *peft_tables.TABLES,
        *peft_frames.TABLES,
        RandLora(),
        TinyLora(),
        GraLora(),
        AdaLora(),
        Lora(),
    )
}
REFUSED = {
    "layer_replication": "repeats layers of the base",
    "target_parameters": "adapts parameters that belong to no linear layer",
    "trainable_token_indices": "trains single embedding rows",
    "lora_bias": "trains a bias on B",
    "use_qalora": "uses QA-LoRA's pooled inputs",
    "alora_invocation_tokens": "is switched on by tokens (aLoRA)",
    "arrow_config": "is routed (Arrow)",
    "use_bdlora": "has block-diagonal factors (BD-LoRA)",
    "kasa_config": "changes the base (KaSA)",
    "ensure_weight_tying": "ties what it trains to the output head",
    "monteclora_config": "samples its factors (MonteCLoRA)",
}
COMMON = ("base_model_name_or_path", "task_type", "target_modules", "inference_mode")


def encode(portable: Portable) -> Folder:
    """Return the two files' contents, from which `decode` gives the adapter back bit for bit."""
    if portable.finish is not None:
        raise UserError(BASE_NEEDED)
    type_, view = _view(portable)
    folder = _folder(portable, view)
    tensors = dict(folder.tensors)
    for site, own in portable.sites.items():
        back = {} if type_ is None else type_.site_back(view.sites[site], portable, site)
        tensors |= {_key(site, OURS + n): t for n, t in own.items() if not _same(t, back.get(n))}
    back = {} if type_ is None else type_.shared_back(view.shared, portable)
    tensors |= {ROOT + OURS + n: t for n, t in portable.shared.items() if not _same(t, back.get(n))}
    return Folder(folder.config, tensors, _record(portable))


def encode_for_others(portable: Portable, view: View | None = None) -> Folder:
    """Return the two files' contents without anything of ours.

    Args:
        view: the adapter as PEFT sees it; None takes PEFT's type for it.

    Raises:
        UserError: PEFT has no type for this adapter.
    """
    if view is None:
        type_, view = _view(portable)
        if type_ is None:
            raise UserError(
                f"PEFT has no type for {portable.method or 'this recipe'} here; save it in our own "
                "format, or see whether it can be exported to lora or merged"
            )
    return _folder(portable, view)


def _folder(portable: Portable, view: View) -> Folder:
    tensors = {_key(site, n): t for site, own in view.sites.items() for n, t in own.items()}
    tensors |= {ROOT + n: t for n, t in view.shared.items()}
    tensors |= {_key(m, leaf): t for m, own in portable.whole.items() for leaf, t in own.items()}
    return Folder({**portable.foreign, **portable.config, **view.config}, tensors)


def decode(folder: Folder) -> Portable:
    """Return the adapter that the two files hold.

    Raises:
        UserError: a type or an option of PEFT's that we cannot run, or tensors that contradict
            the configuration.
    """
    kind = folder.config["peft_type"]
    if kind != OWN_TYPE and kind not in TYPES:
        hint = near_misses(kind, TYPES) or f"; these can: {', '.join(TYPES)}"
        raise UserError(f"adapters of PEFT's type {kind} cannot be loaded{hint}")
    if kind == OWN_TYPE and not folder.record:
        raise UserError(
            f"the weights in {folder.path} have lost their loralab record (safetensors metadata), "
            "so the method is unknown; use the file as loralab wrote it"
        )
    sites, shared, whole, base = _sort(folder, TYPES.get(kind))
    if folder.record:
        return _own(folder, sites, shared, whole, base)
    return _foreign(folder, TYPES[kind], sites, shared, whole, base)


def _view(portable: Portable) -> tuple[PeftType | None, View]:
    for type_ in TYPES.values():
        view = type_.view(portable)
        if view is not None:
            return type_, view
    spec = portable.spec
    note = (
        f"PEFT has no type for {portable.method or 'this recipe'}; this adapter is read by "
        "loralab.load(model, folder)"
    )
    config = {"peft_type": OWN_TYPE, "note": note, "method": portable.method, "r": spec.rank}
    return None, View(config, {site: {} for site in portable.sites})


def _record(portable: Portable) -> dict[str, Any]:
    return {
        "version": __version__,
        "method": portable.method,
        "spec": spec_to_json(portable.spec),
        "tensors": sorted(next(iter(portable.sites.values()), {})),
        "shared": sorted(portable.shared),
        "sizes": portable.sizes,
        "sites": list(portable.sites),
        "layers": {n: dataclasses.astuple(portable.layer(n)) for n in portable.layers},
        "start_again": portable.start_again,
        "foreign": sorted(portable.foreign),
    }


def _own(
    folder: Folder,
    sites: dict[str, Tensors],
    shared: Tensors,
    whole: dict[str, Tensors],
    base: Tensors,
) -> Portable:
    record, type_ = folder.record, TYPES.get(folder.config["peft_type"])
    try:
        order = record.get("sites", record["sizes"])
        portable = Portable(
            spec=spec_from_json(record["spec"]),
            method=record["method"],
            sites=dict.fromkeys(order, dict.fromkeys(record["tensors"])),  # type: ignore
            shared=dict.fromkeys(record["shared"]),  # type: ignore[arg-type]
            whole=whole,
            sizes={n: s and tuple(s) for n, s in record["sizes"].items()},
            config={k: folder.config.get(k) for k in (*COMMON, "modules_to_save")},
            foreign={k: folder.config[k] for k in record["foreign"] if k in folder.config},
            layers={
                n: Layer(k, (*size,), bias)
                for n, (k, size, bias) in record.get("layers", {}).items()
            },
            start_again=record["start_again"],
            base=base,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the loralab record in {folder.path} is not one that this version "
            f"({__version__}) reads: {error!r}"
        ) from None
    found = {}
    for name in portable.sites:
        said, extra = _split(sites.get(name, {}))
        back = type_.site_back(said, portable, name) if type_ and said else {}
        found[name] = {**back, **extra}
    portable = dataclasses.replace(portable, sites=found)
    said, extra = _split(shared)
    back = type_.shared_back(said, portable) if type_ and said else {}
    return dataclasses.replace(portable, shared={**back, **extra})


def _foreign(
    folder: Folder,
    type_: PeftType,
    sites: dict[str, Tensors],
    shared: Tensors,
    whole: dict[str, Tensors],
    base: Tensors,
) -> Portable:
    config = folder.config
    _refuse(config)
    if not sites:
        raise UserError(f"{folder.path} holds no tensor of a {type_.name} adapter")
    try:
        portable = type_.read(config, sites, shared, whole)
    except UserError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"adapter_config.json in {folder.path} cannot be understood: {type(error).__name__}, "
            f"{str(error).splitlines()[0]}"
        ) from None
    used = {*type_.keys, *COMMON, "modules_to_save", "peft_type", "bias", "fan_in_fan_out"}
    foreign = {k: v for k, v in config.items() if k not in used}
    kept = {k: config.get(k) for k in (*COMMON, "modules_to_save")}
    return dataclasses.replace(portable, config=kept, foreign=foreign, base=base)


def _refuse(config: dict[str, Any]) -> None:
    for key, what in REFUSED.items():
        if config.get(key):
            raise UserError(f"this adapter {what} ({key}), which cannot be run here")
    if config.get("bias", "none") != "none":
        raise UserError(
            f"this adapter trains the base's biases (bias={config['bias']!r}), which cannot be "
            "loaded; train it with bias='none'"
        )


def _sort(
    folder: Folder, type_: PeftType | None
) -> tuple[dict[str, Tensors], Tensors, dict[str, Tensors], Tensors]:
    """Return tensors by site, shared ones, modules trained whole, and what the file repeats of the
    base, from the keys alone.
    """
    sites: dict[str, Tensors] = defaultdict(dict)
    whole: dict[str, Tensors] = defaultdict(dict)
    shared: Tensors = {}
    base: Tensors = {}
    suffixes = sorted(type_.suffixes if type_ else (), key=len, reverse=True)
    for key, tensor in folder.tensors.items():
        if not key.startswith(PREFIX):
            if not key.startswith(ROOT):
                raise UserError(
                    f"{folder.path} has a tensor {key!r}, which is not PEFT's way of naming; its "
                    f"keys begin with {PREFIX}"
                )
            shared[key.removeprefix(ROOT)] = tensor
            continue
        path = key.removeprefix(PREFIX)
        if ".base_layer." in path:
            base[path.replace(".base_layer.", ".")] = tensor
            continue
        parent, _, leaf = path.rpartition(".")
        suffix = next((s for s in suffixes if path == s or path.endswith("." + s)), None)
        if leaf.startswith(OURS):
            sites[parent][leaf] = tensor
        elif suffix is not None:
            sites[path[: -len(suffix)].rstrip(".")][suffix] = tensor
        else:
            whole[parent][leaf] = tensor
    return dict(sites), shared, dict(whole), base


def _split(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Return PEFT's tensors, and ours by their own names."""
    extra = {n.removeprefix(OURS): t for n, t in tensors.items() if n.startswith(OURS)}
    return {n: t for n, t in tensors.items() if not n.startswith(OURS)}, extra


def _key(path: str, name: str) -> str:
    return PREFIX + (f"{path}.{name}" if path else name)


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.dtype == other.dtype and torch.equal(one, other)
