"""A portable adapter onto a model: the layers found, the tensors filled in."""

import copy
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from loralab.core.bank import PAST, START
from loralab.core.layers import frozen_weight, layer_kind
from loralab.core.pack import Pack
from loralab.core.targets import adaptable_names, resolve_targets
from loralab.errors import UserError, near_misses
from loralab.interop.portable import KEPT, Blank, Portable, describe, shared_key
from loralab.recipe import Form, Tensors

if TYPE_CHECKING:
    from loralab.core.adapter import Adapter


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
    told = describe(model, pack)
    kept = {k: v for k, v in portable.config.items() if k in KEPT and v and k not in told}
    adapter.foreign_config = {**portable.foreign, **kept}
    return adapter


def _any_rank(form: Form) -> Form:
    """Return the Form without the limit on ranks, which is advice for new adapters.

    An anchored adapter that PEFT turned into a pair of rank 2r may well be above it.
    """
    free = copy.copy(form)
    object.__setattr__(free, "any_rank", True)
    return free


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
    left_out = {name for name, rank in portable.spec.site_ranks.items() if not rank}
    return chosen is None or chosen - set(portable.whole) - left_out != set(portable.sites)


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
