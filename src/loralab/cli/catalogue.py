"""`loralab methods` and `loralab show`: the catalogue, and one method of it."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from tyro.conf import Positional

from loralab.cli.output import Answer, Command, table


@dataclass(frozen=True, kw_only=True)
class Methods(Command):
    """List every method: name, axis, paper, trained tensors and their number.

    The numbers are counted on one layer W [m, n] = [240, 336] at rank r = 8.
    """

    axis: str | None = None
    """only the methods of this axis"""

    def run(self) -> Answer:
        """Return the catalogue."""
        rows = [described(row) for row in _methods(self.axis)]
        plain_lora = described(*_methods(None, only="lora"))["cost"]["n_trained"]
        text = table(
            ["method", "axis", "paper", "trained", "/ LoRA", "summary"],
            [
                [
                    row["name"],
                    ", ".join(row["axes"]),
                    source(row["paper"]),
                    row["cost"]["n_trained"],
                    f"{row['cost']['n_trained'] / plain_lora:.2f}",
                    row["summary"],
                ]
                for row in rows
            ],
        )
        return Answer(rows, text + "\n\n`loralab show METHOD` says more about one.")


@dataclass(frozen=True, kw_only=True)
class Show(Command):
    """Show one method: equation, hyper-parameters with defaults, traps, citation."""

    method: Positional[str]
    """its name or an alias"""

    def run(self) -> Answer:
        """Return one method's page."""
        from loralab.methods import get

        row = described(*_methods(None, only=get(self.method).name))
        return Answer(row | {"bibtex": bibtex(row)}, page(row))


def _methods(axis: str | None, only: str = "") -> list[dict[str, Any]]:
    from loralab.methods import methods

    return [row for row in methods(axis) if only in ("", row["name"])]


def described(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of `loralab.methods()` with its measured cost and tensors."""
    from loralab.cli.cost import measure
    from loralab.methods import get

    cost = measure(get(row["name"]).recipe)
    return row | {"tensors": cost.trained | cost.frozen, "cost": dataclasses.asdict(cost)}


def source(paper: dict[str, Any]) -> str:
    """Return "arXiv 2106.09685 (2021)", or the venue where there is no arXiv number."""
    where = f"arXiv {paper['arxiv']}" if paper["arxiv"] else paper["venue"]
    return f"{where} ({paper['year']})"


def page(row: dict[str, Any]) -> str:
    """Return the text of `loralab show`."""
    paper, cost = row["paper"], row["cost"]
    names = ", ".join([row["name"], *row["aliases"]])
    trained = ", ".join(f"{name} {shape}" for name, shape in cost["trained"].items())
    frozen = ", ".join(f"{name} {shape}" for name, shape in cost["frozen"].items())
    lines = [
        f"{names} ({', '.join(row['axes'])})",
        row["summary"],
        "",
        f"  {row['equation']}",
        "",
        "Pieces",
        *[f"  {kind:9} {name}" for kind, name in row["pieces"].items()],
        "",
        f"Tensors of one layer W [m, n], counted at m, n, r = {_layer()}",
        f"  trained   {trained or 'none'}: {cost['n_trained']:,} numbers",
        *(
            [f"  kept      {frozen or 'the start'}: {cost['n_frozen']:,} numbers"]
            if cost["n_frozen"]
            else []
        ),
        "",
        "Hyper-parameters (set them with --set NAME=VALUE, or in a study with [methods.settings])",
        *[f"  {name} = {value!r}" for name, value in row["settings"].items()],
        *(["  none"] if not row["settings"] else []),
        "",
        *(["Traps", *[f"  - {trap}" for trap in row["traps"]], ""] if row["traps"] else []),
        "Source",
        f"  {paper['authors']}. {paper['title']}. {source(paper)}.",
        *([f"  formula: {paper['equation']}"] if paper["equation"] else []),
        *([f"  checked against: {paper['verified']}"] if paper["verified"] else []),
        "",
        bibtex(row),
    ]
    return "\n".join(lines)


def _layer() -> str:
    from loralab.cli.cost import D_IN, D_OUT, RANK

    return f"{D_OUT}, {D_IN}, {RANK}"


def bibtex(row: dict[str, Any]) -> str:
    """Return a BibTeX entry of the method's paper."""
    paper = row["paper"]
    fields = {
        "title": "{" + paper["title"] + "}",
        "author": paper["authors"].replace(", ", " and "),
        "year": paper["year"],
        **({"eprint": paper["arxiv"], "archivePrefix": "arXiv"} if paper["arxiv"] else {}),
        **({"note": paper["venue"]} if paper["venue"] else {}),
    }
    body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@misc{{{row['name']}{paper['year']},\n{body}\n}}"
