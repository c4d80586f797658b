"""Ways to measure curvature against exact Lanczos one block at a time: time, passes, agreement.

Run with `python benchmarks/curvature.py [--quick]`.
"""

from typing import Any

import common
import torch
from common import ratio, spread
from scipy.stats import spearmanr
from torch import nn

import loralab
from loralab.errors import UserError
from loralab.models import load_model
from loralab.tasks import load_task

METHODS = ("lora", "pissa", "olora", "init_ab", "milora")
REFERENCE = "exact, one block at a time"
WAYS: dict[str, dict[str, Any]] = {
    REFERENCE: {"way": "exact", "pack": 1},
    "exact, packs of 8": {"way": "exact", "pack": 8},
    "exact, packs of 21": {"way": "exact", "pack": 21},
    "Gauss-Newton, 8 draws": {"way": "gauss_newton", "draws": 8},
    "closed form": {"way": "closed_form"},
}


class Counted:
    """Counts the model's forward passes and the rows in them while it is open."""

    def __init__(self, model: nn.Module) -> None:
        self.passes = self.rows = 0
        self._handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        self.passes += 1
        self.rows += len(inputs["input_ids"])

    def close(self) -> None:
        self._handle.remove()


def measure(model: nn.Module, task: Any, method: str, n_items: int, repeats: int) -> dict[str, Any]:
    """Return, per way, seconds, passes, rows and the largest eigenvalue of every block."""
    batch = task.batch("train", range(n_items))
    found: dict[str, Any] = {}

    def run(way: str) -> None:
        counted = Counted(model)
        try:
            result = loralab.curvature(
                model, method, [batch], losses=task.losses, rank=8, **WAYS[way]
            )
        finally:
            counted.close()
        values = [block.lambda_max for block in result.blocks]
        found[way] = {"passes": counted.passes, "rows": counted.rows, "values": values}

    possible = {}
    for way in WAYS:
        try:
            run(way)
        except UserError:  # the closed form asks for B = 0
            continue
        possible[way] = lambda way=way: run(way)
    times = common.interleaved(possible, repeats, warmup=0)
    return {way: found[way] | {"seconds": times[way]} for way in possible}


def rows(method: str, found: dict[str, Any]) -> list[dict[str, str]]:
    """Return one line per way."""
    exact = found[REFERENCE]
    lines = []
    for way, f in found.items():
        of_exact = spread(a / b for a, b in zip(f["values"], exact["values"], strict=True))
        order = float(spearmanr(f["values"], exact["values"]).statistic)
        lines.append(
            {
                "method": method,
                "way": way,
                "time, s": f"{spread(f['seconds']).median:.2f}",
                "times faster": ratio(exact["seconds"], f["seconds"]).text(1),
                "passes": str(f["passes"]),
                "rows in them": str(f["rows"]),
                "lambda_max / exact": of_exact.text(3),
                "rank correlation": f"{order:.3f}",
            }
        )
    return lines


NOTE = """Tiny base, synthetic task, {n} training rows, r = 8, all {blocks} adapted layers as
blocks. *Passes*: forward passes of the model, each with one backward, and a second backward in the
exact way. *Rows in them*: their batch rows together, which is the arithmetic that was done.
*lambda_max / exact*: median over blocks (quartiles) against Lanczos one block at a time, itself
converged to 1 %. Starts, gradients and the eigenvalue problems are inside the time."""


def main() -> None:
    only = {"nargs": "*", "default": list(METHODS), "choices": METHODS}
    args = common.arguments(__doc__, brief={"action": "store_true"}, only=only)
    before = common.record()
    n_items, repeats = (4, 1) if args.quick else (16, 1 if args.brief else 3)
    model, tokenizer = load_model("tiny")
    task = load_task("synthetic", tokenizer, model)
    torch.manual_seed(0)
    figures = {m: measure(model, task, m, n_items, repeats) for m in args.only}
    lines = [line for method, found in figures.items() for line in rows(method, found)]
    blocks = len(next(iter(figures.values()))[REFERENCE]["values"])
    sections = {
        "Ways to measure curvature": common.table(lines),
        "How it is measured": NOTE.format(n=n_items, blocks=blocks),
    }
    common.write("curvature", args.out, before, figures, sections)


if __name__ == "__main__":
    main()
