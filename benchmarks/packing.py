"""Packed training against one trial at a time, and the three factors of a study's saving apart.

Packing: one step of K = 1 to 32 trials in a pack against K single steps of ours, of eager PEFT and
of ours under torch.compile. Early stopping: see stopping.py. Start-up: see startup.py.
Run with `python benchmarks/packing.py [--quick] [--no-compile] [--only steps|stop|start]`.
"""

import copy
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import common
import startup
import stopping
import torch
from common import ratio, spread
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loralab.models import load_model
from loralab.tasks import load_task
from loralab.tasks.base import Batch, Task

SIZES, STEPS = (1, 2, 4, 8, 16, 32), 150
SINGLE = {"ours": "ours, one by one", "peft": "PEFT, eager", "compiled": "ours, compiled"}


class RandomTokens(Task):
    """Next-token training on random tokens: data that costs nothing."""

    name, metric = "random", "nll"

    def __init__(self, vocabulary: int, length: int) -> None:
        self.tokens = torch.randint(vocabulary, (256, length))

    def size(self, split: str) -> int:
        return len(self.tokens)

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        ids = self.tokens[list(indices)]
        return {"input_ids": ids, "labels": ids}

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        each = cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        return each.view(labels.shape).sum(-1), torch.full((len(labels),), labels.shape[-1])

    def scores(self, model: nn.Module, split: str, indices: Sequence[int], copies: int) -> Tensor:
        raise NotImplementedError("nothing is scored here")


def bases() -> dict[str, tuple[nn.Module, Task]]:
    model, tokenizer = load_model("tiny")
    tiny = model, load_task("synthetic", tokenizer, model)
    return {
        "tiny base (width 64, 3 layers), 16 x 15 tokens": tiny,
        "Llama of width 256, 4 layers, 16 x 32 tokens": (
            common.llama(256, 4, 688),
            RandomTokens(1024, 32),
        ),
    }


def steps(base: nn.Module, task: Task, compiled: bool, repeats: int) -> dict[str, Any]:
    """Return the seconds of every contestant's step, and of the compiled one's first."""
    step = {
        f"pack {k}": startup.our_step(copy.deepcopy(base), task, startup.trials(k, 10**6))
        for k in SIZES
    }
    one = startup.trials(1, 10**6)
    step["peft"] = startup.peft_step(copy.deepcopy(base), task, one[0])
    first = None
    if compiled:
        step["compiled"] = startup.our_step(copy.deepcopy(base), task, one, compiled=True)
        began = time.perf_counter()
        step["compiled"]()
        first = time.perf_counter() - began
    return {"seconds": common.interleaved(step, repeats), "compiling": first}


def step_rows(found: dict[str, Any]) -> list[dict[str, str]]:
    times = found["seconds"]
    single = {"ours": "pack 1", "peft": "peft", "compiled": "compiled"}
    rows = []
    for k in SIZES:
        packed = times[f"pack {k}"]
        each = spread(t / k for t in packed)
        row = {"K": str(k), "step, ms per trial": f"{1e3 * each.median:.2f}"}
        for key, name in single.items():
            if name in times:
                against = ratio([k * t for t in times[name]], packed)
                row[f"K x {SINGLE[key]} / packed"] = against.text()
        rows.append(row)
    singles = [
        {"K": f"1, {SINGLE[key]}", "step, ms per trial": f"{1e3 * spread(times[n]).median:.2f}"}
        for key, n in single.items()
        if n in times and key != "ours"
    ]
    return rows + singles


def child(mode: str, k: int, n_steps: int, threads: int, cache: str) -> dict[str, float]:
    """Run one process of startup.py; return the seconds of its parts and of all of it."""
    words = [mode, str(k), str(n_steps), str(threads)]
    script = Path(__file__).parent / "startup.py"
    began, wall = time.perf_counter(), time.time()
    found = common.json_of(
        subprocess.run(
            [sys.executable, str(script), *words],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
            capture_output=True,
            text=True,
            check=True,
        )
    )
    found["interpreter"] = found.pop("reached") - wall
    return found | {"total": time.perf_counter() - began}


def processes(compiled: bool, k: int, threads: int, repeats: int) -> dict[str, Any]:
    """Return `repeats` measurements of whole processes, in turns, and the cold compilation."""
    wanted = {f"one process, pack of {k}": ("ours", k), "one trial, ours": ("ours", 1)}
    wanted["one trial, PEFT"] = ("peft", 1)
    found: dict[str, Any] = {}
    with TemporaryDirectory() as cache:
        if compiled:
            found["one trial, compiled, cold cache"] = [child("compiled", 1, STEPS, threads, cache)]
            wanted["one trial, compiled, warm cache"] = ("compiled", 1)
        for _ in range(repeats):
            for name, (mode, size) in wanted.items():
                found.setdefault(name, []).append(child(mode, size, STEPS, threads, cache))
    return found


def process_rows(found: dict[str, Any], k: int) -> list[dict[str, str]]:
    packed = spread(run["total"] for run in found[f"one process, pack of {k}"])
    rows = []
    for name, runs in found.items():
        total = spread(run["total"] for run in runs)
        row = {"process": name}
        for part in ("interpreter", "imports", "model and task", "adapter", "first step"):
            row[part + ", s"] = f"{spread(run[part] for run in runs).median:.2f}"
        row[f"{STEPS - 1} more steps, s"] = f"{spread(r['other steps'] for r in runs).median:.2f}"
        row["total, s"] = total.text()
        trials = 1 if name.startswith("one trial") else k
        row[f"{k} trials this way / pack"] = f"{k / trials * total.median / packed.median:.2f}"
        rows.append(row)
    return rows


def factors(figures: dict[str, Any], k: int) -> list[dict[str, str]]:
    """Return the three factors of the tiny base's study, apart."""
    times = next(iter(figures["steps"].values()))["seconds"]
    packing = ratio([k * t for t in times["pack 1"]], times[f"pack {k}"])
    saved, real = figures["stopping"]["judged"]["default"]["saved"], figures["stopping"]["seconds"]
    single = figures["processes"]["one trial, ours"]
    training = [run["first step"] + run["other steps"] for run in single]
    once = ratio(
        [k * run["total"] for run in single],
        [run["total"] + (k - 1) * t for run, t in zip(single, training, strict=True)],
    )
    return [
        {"factor": f"packing, K = {k}", "of time": packing.text()},
        {
            "factor": "early stopping, default rule",
            "of time": f"{1 / (1 - saved):.2f} of steps; {real['full'] / real['stopped']:.2f} of "
            "seconds, one run",
        },
        {"factor": f"start-up paid once for {k} trials of {STEPS} steps", "of time": once.text()},
    ]


def main() -> None:
    flag, parts = {"action": "store_true"}, ("steps", "stop", "start")
    only = {"nargs": "*", "choices": parts, "default": list(parts)}
    args = common.arguments(__doc__, no_compile=flag, brief=flag, only=only)
    before, compiled, k = common.record(), not args.no_compile, 16
    figures: dict[str, Any] = {}
    sections: dict[str, str] = {}
    if "steps" in args.only:
        repeats = 3 if args.quick else 5 if args.brief else 15
        figures["steps"] = {n: steps(*b, compiled, repeats) for n, b in bases().items()}
        for name, found in figures["steps"].items():
            sections[f"Step time, LoRA r = 8, {name}"] = common.table(step_rows(found))
    if "start" in args.only:
        figures["processes"] = processes(
            compiled, k, args.threads, 1 if args.quick else 2 if args.brief else 5
        )
        title = f"Whole processes on the tiny base, {STEPS} steps"
        sections[title] = common.table(process_rows(figures["processes"], k))
    if "stop" in args.only:
        figures["stopping"] = stopping.measure(args.quick, args.brief)
        agrees = figures["stopping"]["replay agrees on"]
        text = f"\n\nA real run under the default rule stopped the same trials in {agrees:.0%}."
        sections[f"Early stopping, replayed on the {'quick ' * args.brief}demo's grid"] = (
            common.table(stopping.rows(figures["stopping"])) + text
        )
    if len(figures) == len(parts):
        sections = {"The three factors apart": common.table(factors(figures, k))} | sections
    common.write("packing", args.out, before, figures, sections)


if __name__ == "__main__":
    main()
