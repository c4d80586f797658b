"""`loralab report`: the page, the tables and the figures of a study."""

import io
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from loralab.cli.output import Answer, Command


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Write report.html, results.csv and figures/ of a study, finished or not."""

    folder: Positional[Path]
    """the study's folder"""
    open: bool = False
    """open the page in a browser"""

    def run(self) -> Answer:
        """Write everything and return the verdict."""
        return written_report(self.folder, open_=self.open)


def written_report(folder: Path, open_: bool = False) -> Answer:
    """Write the report of a study; return the verdict, its table and the page's path.

    Raises:
        UserError: there is no study, or the folder cannot be written.
    """
    from loralab.report import verdict_sentences, verdict_table, write_report
    from loralab.study.results import load_results

    results = load_results(folder)
    page = write_report(folder, results, open_)
    sentences = verdict_sentences(results)
    data = {
        "report": page,
        "results": folder / "results.csv",
        "figures": folder / "figures",
        "verdict": sentences,
        "choices": results.choices,
    }
    text = [rendered(verdict_table(results)), *sentences, "", f"report: {page}"]
    return Answer(data, "\n".join(text))


def rendered(table: Any) -> str:
    """Return a rich table as text: in colour on a terminal, plain and unfolded elsewhere."""
    from rich.console import Console

    out = sys.__stdout__
    terminal = out is not None and out.isatty()
    width = shutil.get_terminal_size().columns if terminal else 200
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip()
