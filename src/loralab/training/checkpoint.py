"""A running pack on disk: one safetensors file with its books as JSON in the header."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from loralab.errors import UserError
from loralab.tasks.base import Task
from loralab.training.outcome import Outcome

if TYPE_CHECKING:
    from loralab.training.loop import _Run

FORMAT = "loralab pack checkpoint 1"


def save_checkpoint(path: Path, run: "_Run", more: Mapping[str, Any] | None = None) -> None:
    """Write all that decides the rest of the run; the old file stays until the new is complete.

    Args:
        more: plain values that `load_checkpoint` gives back.
    """
    run.share_time()
    tensors = {f"pack/{n}": t for n, t in _pack_tensors(run).items()}
    tensors |= {f"rule/{n}": t for n, t in run.optimizer.tensors().items()}
    tensors["sums"], tensors["active"] = run.sums, run.active
    books = {
        "format": FORMAT,
        "step": run.step,
        "before": run.before,
        "memory": [sorted(group.memory) for group in run.optimizer.groups],
        "more": more or {},
        "base": run.base_hash,
        "trials": [t.id for t in run.given],
        "present": run.present,
        "shown": [repr(x) for x in run.shown],
        "peak_bytes": run.memory.peak_bytes,
        "anchored": [bank.anchored for _, bank in run.pack.banks()],
        "ranks": [bank.site.rank for _, bank in run.pack.banks()],
        "slots": [[dict(s.site_ranks), dict(s.site_scales)] for s in run.pack.slots],
        "outcomes": [dataclasses.asdict(o) for o in run.outcomes],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    contiguous = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    save_file(contiguous, temporary, metadata={"books": json.dumps(books)})
    os.replace(temporary, path)


def base_hash(model: nn.Module, task: Task) -> str:
    """Return a hash of the base's dtype and of 64 items of the task, spread over all."""
    n = task.size("train")
    digest = hashlib.sha256(f"{next(model.parameters()).dtype} {n}".encode())
    items = sorted({i * (n - 1) // 63 for i in range(64)})
    for name, tensor in sorted(task.batch("train", items).items()):
        digest.update(name.encode() + tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_checkpoint(path: Path, run: "_Run") -> dict[str, Any]:
    """Put a fresh run where the checkpoint left off; return what `more` was.

    Raises:
        UserError: the file is damaged, or belongs to other trials, other data or another dtype.
    """
    try:
        with safe_open(path, framework="pt") as file:
            books = json.loads((file.metadata() or {})["books"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({error}); delete it to start the pack anew"
        ) from error
    if books.get("base", run.base_hash) != run.base_hash:  # older ones do not say
        raise UserError(
            f"checkpoint {path} was made on other data or with another dtype of the base; "
            "restore them, or delete it to start anew"
        )
    if books["format"] != FORMAT or books["trials"] != [t.id for t in run.given]:
        raise UserError(f"checkpoint {path} is of other trials; delete it to start the pack anew")
    run.keep([run.present.index(i) for i in books["present"]])
    run.before = books.get("before", 0)
    run.step, run.shown = books["step"], [float(x) for x in books["shown"]]
    run.outcomes = [
        Outcome(**o | {key: [tuple(point) for point in o[key]] for key in ("curve", "ranks")})
        for o in books["outcomes"]
    ]
    run.sums, run.active = tensors.pop("sums"), tensors.pop("active")
    run.memory.restore(books["peak_bytes"])
    banks = [bank for _, bank in run.pack.banks()]
    for bank, anchored, rank in zip(banks, books["anchored"], books["ranks"], strict=True):
        bank.anchored = anchored
        if rank != bank.site.rank:
            asked = bank.site.asked or bank.site.rank
            bank.site = dataclasses.replace(bank.site, rank=rank, asked=asked)
    run.pack.slots = [
        dataclasses.replace(spec, site_ranks=ranks, site_scales=scales)
        for spec, (ranks, scales) in zip(run.pack.slots, books["slots"], strict=True)
    ]
    _put(run, _with_prefix(tensors, "pack/"))
    rule = _with_prefix(tensors, "rule/")
    run.optimizer.load_tensors({n: t.to(run.device) for n, t in rule.items()})
    for group, names in zip(run.optimizer.groups, books.get("memory", ()), strict=False):
        group.memory = set(names)
    return books.get("more", {})


def _with_prefix(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the entries whose names begin with `prefix`, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _pack_tensors(run: "_Run") -> dict[str, torch.Tensor]:
    """Return every parameter and buffer of the pack, the non-persistent ones as well."""
    named = dict(run.pack.named_parameters())
    return named | {n: b for n, b in run.pack.named_buffers() if b is not None}


@torch.no_grad()
def _put(run: "_Run", saved: dict[str, torch.Tensor]) -> None:
    now = _pack_tensors(run)
    for name, tensor in saved.items():
        if name in now and now[name].shape == tensor.shape:
            now[name].copy_(tensor)
            continue
        owner, _, leaf = name.rpartition(".")
        module, value = run.pack.get_submodule(owner), tensor.to(run.device)
        if leaf in module._parameters:  # its ranks have changed
            module.register_parameter(leaf, nn.Parameter(value, now[name].requires_grad))
        else:  # factors that restarts folded, which a fresh pack has not yet
            module._buffers[leaf] = value
