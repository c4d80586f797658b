"""What early stopping saves and what it loses: full curves once, then the rules replayed on them.

Used by packing.py. The curves are those of the demo's own grid, every trial trained to the end.
"""

import dataclasses
import time
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch

from loralab.study.packing import pack_trials
from loralab.study.parse import read_spec
from loralab.study.search import Planned, families, grid_trials
from loralab.training.early_stop import EarlyStop

RULES = {
    "default": EarlyStop(),
    "no halving": EarlyStop(gap=float("inf")),
    "gap 0.25": EarlyStop(gap=0.25),
    "gap 1": EarlyStop(gap=1.0),
    "earlier (0.2, 0.3)": EarlyStop(grace=0.2, halving=0.3),
    "later (0.4, 0.7)": EarlyStop(grace=0.4, halving=0.7),
}
Curves = list[dict[str, Any]]


def demo_trials(quick: bool, brief: bool) -> list[Planned]:
    """Return the demo's grid, with three seeds unless `quick`, so that there are more optima."""
    name = "demo_quick.toml" if quick or brief else "demo.toml"
    text = (files("loralab") / "data" / name).read_text(encoding="utf-8")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "study.toml"
        path.write_text(text, encoding="utf-8")
        spec = read_spec(path)
    spec = dataclasses.replace(spec, seeds=(0,) if quick else (0, 1, 2))
    return grid_trials(spec, 2048, families(spec))


def record_curves(
    planned: list[Planned], early_stop: EarlyStop | None = None
) -> tuple[Curves, float]:
    """Train everything in packs of 16; return one record per trial, and the training seconds."""
    from loralab.models import load_model
    from loralab.tasks import load_task
    from loralab.training.loop import train_pack

    model, tokenizer = load_model(planned[0].trial.model)
    task = load_task(planned[0].trial.task, tokenizer, model)
    found, seconds = [], 0.0
    for pack in pack_trials(planned, 16):
        given = [p.trial for p in pack]
        began = time.perf_counter()
        trained = train_pack(model, task, given, early_stop=early_stop)
        seconds += time.perf_counter() - began
        scores = trained.evaluate("validation").nan_to_num(0.0).mean(-1).tolist()
        trained.close()
        found += [
            {"label": p.label, "trial": p.trial, "score": s}
            | {k: getattr(o, k) for k in ("status", "step", "curve", "reason")}
            for p, o, s in zip(pack, trained.outcomes, scores, strict=True)
        ]
    return found, seconds


def replay(curves: Curves, rule: EarlyStop) -> dict[int, int]:
    """Return {number of a trial: step at which it leaves} under the rule."""
    left: dict[int, int] = {}
    steps = curves[0]["trial"].steps
    for step in sorted({int(rule.grace * steps), int(rule.halving * steps)}):
        present = [i for i in range(len(curves)) if i not in left]
        seen = [
            SimpleNamespace(curve=[p for p in c["curve"] if p[0] <= step], reason=c["reason"])
            for c in curves
        ]
        lost = [c["status"] == "diverged" and c["step"] < step for c in curves]
        run = SimpleNamespace(
            step=step,
            n_steps=steps,
            present=present,
            outcomes=seen,
            trials=[c["trial"] for c in curves],
            active=torch.tensor([not lost[i] for i in present]),
        )
        left |= {present[slot]: step for slot in rule.hopeless(run)}  # type: ignore[arg-type]
    return left


def judge(curves: Curves, left: dict[int, int]) -> dict[str, Any]:
    """Return what a rule saved and lost. A family is a method and a seed."""
    steps = curves[0]["trial"].steps
    kept: dict[tuple, list[int]] = {}
    for i, c in enumerate(curves):
        kept.setdefault((c["label"], c["trial"].seed), []).append(i)
    lost, regrets = 0, []
    for family in kept.values():
        best = max(curves[i]["score"] for i in family)
        rest = max((curves[i]["score"] for i in family if i not in left), default=0.0)
        lost += rest < best
        regrets.append(best - rest)
    saved = {i: (steps - step) / steps / len(curves) for i, step in left.items()}
    diverged = sum(s for i, s in saved.items() if curves[i]["status"] == "diverged")
    return {
        "saved": sum(saved.values()),
        "saved on diverged": diverged,
        "stopped": len(left),
        "trials": len(curves),
        "families": len(kept),
        "optimum lost": lost,
        "largest regret": max(regrets),
    }


def measure(quick: bool, brief: bool) -> dict[str, Any]:
    """Return curves, the judgement of every rule, and one real run under the default rule."""
    planned = demo_trials(quick, brief)
    curves, full = record_curves(planned)
    judged = {name: judge(curves, replay(curves, rule)) for name, rule in RULES.items()}
    stopped, short = record_curves(planned, EarlyStop())
    left = {i: c["step"] for i, c in enumerate(stopped) if c["status"] == "stopped"}
    gone = {i for i, s in replay(curves, EarlyStop()).items() if curves[i]["status"] != "diverged"}
    return {
        "judged": judged,
        "seconds": {"full": full, "stopped": short},
        "replay agrees on": 1 - len(gone ^ set(left)) / len(curves),
        "curves": [c | {"trial": c["trial"].to_dict()} for c in curves],
    }


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the table of rules."""
    return [
        {
            "rule": name,
            "compute saved": f"{j['saved']:.0%}",
            "of it on diverged trials": f"{j['saved on diverged']:.0%}",
            "factor": f"{1 / (1 - j['saved']):.2f}",
            "trials stopped": f"{j['stopped']} of {j['trials']}",
            "optimum lost": f"{j['optimum lost']} of {j['families']} families",
            "largest loss of score": f"{j['largest regret']:.3f}",
        }
        for name, j in found["judged"].items()
    ]
