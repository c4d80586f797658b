"""`loralab methods` and `loralab show`: the catalogue, and one method of it."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from tyro.conf import Positional

from loralab.cli.output import Answer, Command, table

YesNo = Literal["yes", "no"]


@dataclass(frozen=True, kw_only=True)
class Methods(Command):
    """List the methods that fit: name, axis, paper, trained numbers and memory against LoRA's.

    Trained numbers and memory are measured on one layer W [m, n] = [240, 336] at rank r = 8: what
    a training step on 1024 tokens holds beside W, its input included.
    """

    axis: str | None = None
    """expansion, sharing, budgeting, optimization, initialization, experts or baseline"""
    piece: str | None = None
    """with this piece: a class such as PiSSA, or KIND=CLASS such as start=PiSSA"""
    mergeable: YesNo | None = None
    """whether the update can be merged into the base weight"""
    needs_data: YesNo | None = None
    """whether it looks at gradients or inputs before it starts, or at a held-out split"""
    layer: str | None = None
    """for this kind of layer: Linear, Conv1D, Conv2d or Embedding"""
    max_params: float | None = None
    """at most this many times LoRA's trained numbers"""
    max_memory: float | None = None
    """at most this many times LoRA's memory in training"""

    def run(self) -> Answer:
        """Return the part of the catalogue that was asked for."""
        from loralab.methods import methods

        found = methods(
            self.axis,
            piece=self.piece,
            mergeable=_truth(self.mergeable),
            needs_data=_truth(self.needs_data),
            layer=self.layer,
            max_params=self.max_params,
            max_memory=self.max_memory,
        )
        rows = [described(row) for row in found]
        if not rows:
            return Answer(rows, "No method fits; ask for less.")
        text = table(
            ["method", "axis", "paper", "params", "memory", "merges", "needs", "summary"],
            [
                [
                    row["name"],
                    ", ".join(row["axes"]),
                    source(row["paper"]),
                    f"{row['cost']['params_ratio']:.2f}x",
                    f"{row['cost']['memory_ratio']:.2f}x",
                    "yes" if row["mergeable"] else "no",
                    ", ".join(row["needs"]) or "-",
                    row["summary"],
                ]
                for row in rows
            ],
        )
        count = "1 method" if len(rows) == 1 else f"{len(rows)} methods"
        if len(rows) > 1 and any("baseline" in row["axes"] for row in rows):
            count += " (full fine-tuning among them, to compare with)"
        return Answer(
            rows,
            f"{text}\n\n{count}; params and memory in multiples of LoRA's. "
            "`loralab show METHOD` says more about one.",
        )


@dataclass(frozen=True, kw_only=True)
class Show(Command):
    """Show one method: equation, defaults, traps, cost, best learning rate seen, citation."""

    method: Positional[str]
    """its name or an alias"""

    def run(self) -> Answer:
        """Return one method's page."""
        from loralab.methods import get, methods

        name = get(self.method).name
        row = described(next(row for row in methods() if row["name"] == name))
        return Answer(row | {"bibtex": bibtex(name)}, page(row))


def _truth(answer: YesNo | None) -> bool | None:
    return None if answer is None else answer == "yes"


def described(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of `loralab.methods()` with its measured cost, its tensors and its findings."""
    from loralab.catalogue import findings
    from loralab.cost import measure, memory
    from loralab.methods import get

    recipe, lora = get(row["name"]).recipe, get("lora").recipe
    cost, held = measure(recipe), memory(recipe)
    ratios = {
        "params_ratio": cost.n_trained / measure(lora).n_trained,
        "memory_bytes": held,
        "memory_ratio": held / memory(lora),
    }
    return row | {
        "tensors": cost.trained | cost.frozen,
        "cost": dataclasses.asdict(cost) | ratios,
        "findings": findings().get(row["name"], {}),
    }


def source(paper: dict[str, Any]) -> str:
    """Return "arXiv 2106.09685 (2021)", or the venue where there is no arXiv number."""
    from loralab import citations
    from loralab.catalogue import Paper

    return citations.source(Paper(**paper))


def bibtex(name: str) -> str:
    """Return a BibTeX entry of the method's paper."""
    from loralab.citations import citation
    from loralab.methods import get

    return citation(get(name)).bibtex


def page(row: dict[str, Any]) -> str:
    """Return the text of `loralab show`."""
    paper = row["paper"]
    names = ", ".join([row["name"], *row["aliases"]])
    lines = [
        f"{names} ({', '.join(row['axes'])})",
        row["summary"],
        "",
        f"  {row['equation']}",
        "",
        "Pieces",
        *[f"  {kind:9} {name}" for kind, name in row["pieces"].items()],
        "",
        "Use",
        f"  layers    {', '.join(row['layers'])}",
        f"  merges    {'yes' if row['mergeable'] else 'no: the update depends on the input'}",
        f"  needs     {', '.join(row['needs']) or 'nothing but training batches'}",
        "",
        *_cost_lines(row),
        "",
        "Best learning rate seen",
        *[f"  {line}" for line in found_lines(row["findings"])],
        "",
        "Hyper-parameters (set them with --set NAME=VALUE, or in a study with [methods.settings])",
        *_setting_lines(row),
        *(["  none"] if not row["settings"] else []),
        "",
        *(["Traps", *[f"  - {trap}" for trap in row["traps"]], ""] if row["traps"] else []),
        "Source",
        f"  {paper['authors']}. {paper['title']}. {source(paper)}.",
        *([f"  formula: {paper['equation']}"] if paper["equation"] else []),
        *([f"  checked against: {paper['verified']}"] if paper["verified"] else []),
        "",
        bibtex(row["name"]),
    ]
    return "\n".join(lines)


def _setting_lines(row: dict[str, Any]) -> list[str]:
    lines = {name: f"  {name} = {value!r}" for name, value in row["settings"].items()}
    width = max(map(len, lines.values()), default=0)
    return [
        f"{line:{width}}  {row['bounds'][name]}" if name in row["bounds"] else line
        for name, line in lines.items()
    ]


def _cost_lines(row: dict[str, Any]) -> list[str]:
    from loralab.cost import D_IN, D_OUT, RANK, TOKENS

    cost, step = row["cost"], row["findings"]
    trained = ", ".join(f"{name} {shape}" for name, shape in cost["trained"].items())
    frozen = ", ".join(f"{name} {shape}" for name, shape in cost["frozen"].items())
    kept = f"  kept      {frozen or 'the start'}: {cost['n_frozen']:,} numbers"
    ratios = [f"{step[key]:.2f} times the {key}" for key in ("time", "memory") if key in step]
    return [
        f"Cost, measured on one layer W [m, n] with m, n, r = {D_OUT}, {D_IN}, {RANK}",
        f"  trained   {trained or 'none'}: {cost['n_trained']:,} numbers, "
        f"{cost['params_ratio']:.2f} times LoRA's",
        *([kept] if cost["n_frozen"] else []),
        f"  memory    {cost['memory_bytes'] / 1e6:.2f} MB in a training step on {TOKENS} tokens, "
        f"{cost['memory_ratio']:.2f} times LoRA's",
        *([f"  step      of a whole model: {' and '.join(ratios)} of LoRA's"] if ratios else []),
    ]


def found_lines(found: dict[str, Any]) -> list[str]:
    """Return what a study over the catalogue found, in words."""
    if "best_lr" not in found:
        return [found.get("why", "no study of this project has tuned it yet")]
    best = found["best_lr"]
    if best is None:
        return [f"none: no learning rate of {found['study']} finished on every seed"]
    said = f"{best:.2g}"
    if found.get("lr_low") and found.get("lr_high"):
        said += f" (fitted optimum {found['lr_low']:.2g} to {found['lr_high']:.2g}, 95 %)"
    if found.get("lower_bound"):
        said += ", at the edge of the grid"
    lines = [said]
    if found.get("score") is not None:
        beside = [
            f"{who} {found[key]:.4g}"
            for who, key in (("LoRA", "lora_score"), ("untouched base", "base_score"))
            if found.get(key) is not None
        ]
        lines.append(
            f"{found.get('metric', 'score')} {found['score']:.4g}"
            + (f" ({', '.join(beside)})" if beside else "")
        )
    setting = [f"rank {found['rank']}", f"{found['steps']} steps", f"{found['seeds']} seeds"]
    lines.append(f"study {found['study']}: {', '.join(setting)}")
    return [*lines, *([found["why"]] if "why" in found else [])]
