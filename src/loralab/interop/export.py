"""Adapters for other programs: PEFT's files, plain LoRA factors, or the merged model."""

import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loralab.core.bank import Bank
from loralab.core.files import CONFIG, keep_apart, load_adapter, read_folder, write_folder, writing
from loralab.core.layers import Weight, read, wide
from loralab.core.update import gives, has_gain, kind, replaces
from loralab.errors import UserError, near_misses
from loralab.interop.peft import decode, encode, encode_for_others
from loralab.interop.peft_lora import EMBEDDING, A, B, lora_config, low_rank
from loralab.interop.peft_type import View, laid_out
from loralab.interop.portable import Portable, from_adapter
from loralab.recipe import Tensors

if TYPE_CHECKING:
    from loralab.core.adapter import Adapter

ROUNDING = 1e-6  # relative error of an update that the rank does not approximate
TARGETS = ("peft", "lora", "merged")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        relative_error: |dW - written dW| / |dW| in the Frobenius norm over all layers; 0 where
            nothing was approximated.
    """

    path: Path
    relative_error: float = 0.0


@dataclass(frozen=True)
class Imported:
    """What was taken over: the folder, the method's name, how many numbers are trained."""

    path: Path
    method: str
    n_params: int


def export(adapter: "Adapter", path: Path, to: str, rank: int | None = None) -> Exported:
    """Write an adapter as "peft", "lora" or "merged"; see `export_adapter`.

    Raises:
        UserError: the method has no such form, or the folder cannot be written.
    """
    _check(to, rank)
    keep_apart(path, base=getattr(getattr(adapter.model, "config", None), "_name_or_path", None))
    if to == "merged":
        return Exported(_merged(adapter, path))
    return _write(from_adapter(adapter), path, to, rank)


def export_folder(
    path: Path, to: str, out: Path, model_ref: str | None = None, rank: int | None = None
) -> Exported:
    """Write the adapter in folder `path` for other programs.

    Args:
        model_ref: the base; what the adapter's configuration names by default. Only "merged", and
            a PEFT file that does not tell its layers' sizes, need one.

    Raises:
        UserError: as `export`, the base is needed and unknown, or `out` is the folder of the
            adapter or of its base.
    """
    _check(to, rank)
    portable = decode(read_folder(path))
    ref = model_ref or portable.config.get("base_model_name_or_path")
    keep_apart(out, adapter=path, base=ref)
    framed = gives(portable.spec.recipe.form, "inner", "outer")  # W' - W is not in the file
    needs_base = to == "merged" or portable.needs_base or (to == "lora" and framed)
    if not needs_base:
        return _write(portable, out, to, rank)
    from loralab.models import load_model

    if ref is None:
        raise UserError(f"{path} does not say which base it was trained on; name the model")
    model, processor = load_model(ref)
    written = export(load_adapter(model, path), out, to, rank)
    if to == "merged" and hasattr(processor, "save_pretrained"):
        with writing(out):
            processor.save_pretrained(out)
    return written


def import_peft(path: Path, out: Path) -> Imported:
    """Rewrite an adapter of PEFT's as ours, without its base.

    Raises:
        UserError: as `load_adapter`, for all that can be seen without the model, or `out` is the
            folder of the adapter or of its base.
    """
    portable = decode(read_folder(path))
    keep_apart(out, adapter=path, base=portable.config.get("base_model_name_or_path"))
    written = write_folder(out, encode(portable))
    return Imported(written, portable.method, portable.count_parameters())


def _check(to: str, rank: int | None) -> None:
    """Raise UserError for a target that there is not, or a rank that would change nothing."""
    if to not in TARGETS:
        hint = near_misses(to, TARGETS) or f"; one of {', '.join(TARGETS)}"
        raise UserError(f"an adapter cannot be exported to {to!r}{hint}")
    if rank is not None and to != "lora":
        raise UserError(f"only an export to 'lora' compresses to a rank, so {to!r} takes no rank")


def _write(portable: Portable, path: Path, to: str, rank: int | None) -> Exported:
    if to == "peft":
        return Exported(write_folder(path, encode_for_others(portable)))
    view, error = as_lora(portable, rank)
    if error > ROUNDING:
        warnings.warn(
            f"{path} approximates the update with a relative error of {error:.3g} "
            "(Frobenius norm over all layers)",
            stacklevel=2,
        )
    return Exported(write_folder(path, encode_for_others(portable, view)), error)


@torch.no_grad()
def as_lora(portable: Portable, rank: int | None = None) -> tuple[View, float]:
    """Return the adapter as plain LoRA and the relative error of its updates.

    Args:
        rank: compress every update to this rank by truncated SVD, the best in the Frobenius norm
            (Eckart and Young); None takes the Form's own factors, which are exact.

    Raises:
        UserError: the update has no dense form, a gain, or no exact factors and no rank is given.
    """
    form, method = portable.spec.recipe.form, portable.method or "this recipe"
    framed = gives(form, "inner", "outer", "base")
    if kind(form) == "branch":
        raise UserError(
            f"{method} has no LoRA form: its update depends on the input; save it in our own format"
        )
    if has_gain(form):
        raise UserError(
            f"{method} has no LoRA form: the magnitude of its rows is not low-rank; export it to "
            "peft, or merge it"
        )
    if replaces(form) or (framed and not portable.weights):
        raise UserError(
            f"{method} has no LoRA form on this base: it puts another matrix in the base's place; "
            "merge it"
        )
    if gives(form, "bias") and any(portable.layer(name).bias for name in portable.sites):
        raise UserError(
            f"{method} has no LoRA form on layers with a bias, which it changes too; merge it"
        )
    if rank is None and not low_rank(form):
        raise UserError(
            f"{method} has a dense update, so that LoRA can only approximate it; say the rank"
        )
    if rank is not None and rank < 1:
        raise UserError(f"rank must be at least 1, not {rank}")
    sites: dict[str, Tensors] = {}
    lost = total = 0.0
    for name in portable.sites:
        bank = portable.bank(name)
        if rank is None:
            sites[name] = dict(zip((B, A), (t[0] for t in bank.unscaled_factors()), strict=True))
            continue
        scale = portable.spec.scale_at(name) or 1.0
        D = _update(bank, portable.weights.get(name)).double() / scale
        sites[name] = truncated(D, rank, like=bank.scale)
        kept = sites[name][B].double() @ sites[name][A].double()
        lost += float((D - kept).square().sum()) * scale**2
        total += float(D.square().sum()) * scale**2
    config = lora_config(portable, sites, dora=False)
    laid = {n: laid_out(t, portable.layer(n), EMBEDDING) for n, t in sites.items()}
    return View(config, laid), (lost / total) ** 0.5 if total else 0.0


def _update(bank: Bank, weight: Weight | None) -> Tensor:
    """Return dW [out, in] of a bank of one; where it turns the base, W' - W."""
    if not bank.frames:
        return bank.delta()[0]
    assert weight is not None
    return bank.dense(weight, 0) - wide(read(weight))


def truncated(D: Tensor, rank: int, like: Tensor) -> Tensors:
    """Return PEFT's pair of the best rank-`rank` approximation of D [out, in]."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    root = S[:rank].sqrt()
    return {B: (U[:, :rank] * root).to(like), A: (root[:, None] * Vh[:rank]).to(like)}


def _merged(adapter: "Adapter", path: Path) -> Path:
    if (path / CONFIG).exists():  # transformers would put that adapter on top of the merged weights
        raise UserError(
            f"{path} holds an adapter, and a merged model beside it would be read with the update "
            "twice; choose another folder"
        )
    was_merged = adapter._merged is not None
    model = adapter.merge()
    try:
        with writing(path), tempfile.TemporaryDirectory(prefix=".saving-", dir=path) as draft:
            _save_model(model, Path(draft))
            for file in sorted(Path(draft).iterdir()):
                os.replace(file, path / file.name)
    finally:
        if not was_merged:
            adapter.unmerge()
    return path


def _save_model(model: nn.Module, folder: Path) -> None:
    from safetensors.torch import save_model

    save: Any = getattr(model, "save_pretrained", None)
    if save is not None:
        from loralab.models.loading import quiet

        with quiet():
            save(folder)
    else:
        save_model(model, str(folder / "model.safetensors"))
