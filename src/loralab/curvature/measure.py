"""`loralab.curvature`: sharpness per adapter block at initialisation, three ways."""

import dataclasses
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from loralab.core.evidence import check_data, measure
from loralab.core.pack import Pack, SlotSpec
from loralab.core.stopgrad import stops
from loralab.curvature.blocks import Block, choose_blocks
from loralab.curvature.cheap import (
    closed_form_ends,
    default_losses,
    gauss_newton_ends,
    gradients,
)
from loralab.curvature.hessian import RowLosses, exact_ends
from loralab.curvature.lanczos import Ends
from loralab.errors import UserError, near_misses
from loralab.recipe import Recipe
from loralab.study.trial import Trial
from loralab.tasks.base import Batch, Task, to_device

WAYS = {
    "exact": "Lanczos on exact Hessian-vector products",
    "closed_form": "s * sigma_max(dL/dW), the coupling at B = 0 (Gauss-Newton part left out)",
    "gauss_newton": "Monte-Carlo Gauss-Newton plus the exact coupling",
}


@dataclass(frozen=True)
class BlockCurvature:
    """One block's spectrum ends; `residual` bounds the error (NaN where no bound exists)."""

    name: str
    lambda_max: float
    lambda_min: float
    residual: float
    n_products: int


@dataclass(frozen=True)
class Curvature:
    """The measured blocks and what was measured.

    Attributes:
        way: a key of WAYS. loss: which loss the Hessian is of.
        seconds: wall time, starts included.
    """

    method: str
    way: str
    loss: str
    rank: int
    blocks: list[BlockCurvature]
    seconds: float

    @property
    def lambda_max(self) -> float:
        """Return the median over blocks of the largest eigenvalue, as 2602.04998 reports it."""
        return statistics.median(b.lambda_max for b in self.blocks)

    @property
    def lambda_min(self) -> float:
        """Return the median over blocks of the smallest eigenvalue."""
        return statistics.median(b.lambda_min for b in self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self) | {
            "way_in_words": WAYS[self.way],
            "lambda_max": self.lambda_max,
            "lambda_min": self.lambda_min,
        }


def curvature(
    model: nn.Module,
    method: str | Recipe = "lora",
    data: Iterable[Batch] = (),
    *,
    way: str = "exact",
    blocks: str = "all",
    losses: RowLosses = default_losses,
    rank: int = 8,
    alpha: float | None = None,
    targets: str | Sequence[str] = "all-linear",
    seed: int = 0,
    rtol: float = 1e-2,
    max_products: int = 60,
    draws: int = 8,
    pack: int = 8,
    modules_to_train: Sequence[str] = (),
    **swaps_and_settings: Any,
) -> Curvature:
    """Return the largest and smallest Hessian eigenvalue of each adapter block at initialisation.

    Args:
        data: batches, dicts of tensors with rows first; the loss is the mean over all their valid
            tokens. Dropout is off.
        way: "exact" (any method), "closed_form" (plain pairs with B = 0; one backward for all
            blocks) or "gauss_newton" (plain pairs; `draws` backwards for all blocks).
        blocks: "all", "whole", or suffixes of layer names joined by commas.
        losses: `losses(model, batch) -> (summed loss [rows], valid count [rows])`.
        rtol: exact and gauss_newton: error bound relative to the larger end, in (0, 1).
        pack: blocks (exact) or sequences (gauss_newton) that run at once.
        rank, alpha, targets, seed, modules_to_train, swaps_and_settings: as in `loralab.adapt`.

    Raises:
        UserError: unknown way or block, no data, or a way that the method does not allow.
    """
    from loralab.methods import build, get

    if not isinstance(model, nn.Module):
        raise UserError(f"curvature takes an nn.Module, not {model!r}")
    check_data(data)
    if way not in WAYS:
        raise UserError(
            f"unknown way {way!r}{near_misses(way, WAYS)}; choose one of {', '.join(WAYS)}"
        )
    if isinstance(rtol, bool) or not isinstance(rtol, int | float) or not 0 < rtol < 1:
        raise UserError(f"rtol must be a number above 0 and below 1, not {rtol!r}")
    began, device = time.perf_counter(), next(model.parameters()).device
    batches = [to_device(dict(b), device) for b in data]
    if not batches:
        raise UserError("curvature needs data: an iterable of at least one batch")
    recipe = method if isinstance(method, Recipe) else build(method, **swaps_and_settings)
    name = "" if isinstance(method, Recipe) else get(method).name
    spec = SlotSpec(
        recipe=recipe,
        rank=rank,
        alpha=alpha,
        seed=seed,
        targets=targets if isinstance(targets, str) else tuple(targets),
        modules_to_train=tuple(modules_to_train),
    )

    def starting(names: list[str], needs: frozenset[str]) -> dict:
        return measure(model, names, needs, batches, lambda m, b: _mean(losses, m, b))

    with stops() as record:
        ends = _ends(
            model, spec, starting, batches, way, blocks, losses, pack, rtol, max_products, draws
        )
    text = "mean cross entropy per valid token or item; dropout off"
    if record.n_met:
        text += "; what the method detaches (such as DoRA's norm) is held constant, as in training"
    found = [
        BlockCurvature(n, e.lambda_max, e.lambda_min, e.residual, e.n_products)
        for n, e in ends.items()
    ]
    return Curvature(name, way, text, rank, found, time.perf_counter() - began)


def _ends(
    model, spec, starting, batches, way, wanted, losses, size, rtol, max_products, draws
) -> dict[str, Ends]:
    probe = Pack(model, [spec], starting)
    try:
        chosen = choose_blocks(probe, wanted)
    finally:
        probe.close()
    G = {}
    if way != "exact":
        G = gradients(model, [n for b in chosen for n in _names(probe, b)], batches, losses)
    n_slots = {"exact": min(size, len(chosen)), "closed_form": 1, "gauss_newton": size}[way]
    pack = Pack(model, [spec] * n_slots, starting)
    try:
        if way == "closed_form":
            return closed_form_ends(pack, chosen, G)
        if way == "gauss_newton":
            return gauss_newton_ends(
                pack, chosen, batches, losses, G, seed=spec.seed, draws=draws, rtol=rtol
            )
        return exact_ends(
            pack, chosen, batches, losses, seed=spec.seed, rtol=rtol, max_products=max_products
        )
    finally:
        pack.close()


def _names(pack: Pack, block: Block) -> list[str]:
    return [pack.names[i] for i in block.sites]


def _mean(losses: RowLosses, model: nn.Module, batch: Batch):
    sums, counts = losses(model, batch)
    return sums.sum() / counts.sum()


def study_curvature(
    model: nn.Module,
    task: Task,
    trials: Mapping[str, Trial],
    *,
    n_items: int = 16,
    way: str = "exact",
    blocks: str = "all",
    pack: int = 8,
    rtol: float = 2e-2,
) -> list[dict[str, Any]]:
    """Return one row per label of a study: its trial's curvature on the first training items.

    Args:
        trials: {label: a trial that says method, rank, alpha, seed and swaps}.
        n_items: training items the loss is over, the same for all labels.
    """
    rows = []
    items = list(range(min(n_items, task.size("train"))))
    batch = task.batch("train", items)
    for label, t in trials.items():
        found = curvature(
            model,
            t.method,
            [batch],
            way=way,
            blocks=blocks,
            losses=task.losses,
            rank=t.rank,
            alpha=t.alpha,
            targets=t.targets,
            seed=t.seed,
            rtol=rtol,
            pack=pack,
            modules_to_train=t.modules_to_train,
            **dict[str, Any](t.swaps),
            **dict[str, Any](t.settings),
        )
        rows.append(
            {"label": label}
            | found.to_dict()
            | {
                "values": [b.lambda_max for b in found.blocks],
                "n_items": len(items),
            }
        )
    return rows
