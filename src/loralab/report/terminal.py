"""The verdict as a rich table."""

from rich.table import Table
from rich.text import Text

from loralab.report.data import ReportData
from loralab.report.tables import Cell, verdict_table

VERDICTS = {
    "better": "bold green",
    "worse": "bold red",
    "equivalent": "cyan",
    "undecided": "yellow",
}


def table(data: ReportData) -> Table:
    """Return one table; studies with several ranks or batch sizes get a section for each."""
    out = Table(title=f"{data.name}: every method at its own best learning rate")
    several = len(data.groups) > 1
    for i, group in enumerate(data.groups):
        rows = verdict_table(data, group)
        if rows is None:
            continue
        if not out.columns:
            for name in (*(("rank", "batch") if several else ()), *rows.columns):
                number = name not in ("method", "verdict")
                out.add_column(name, justify="right" if number else "left")
        if i:
            out.add_section()
        for j, row in enumerate(rows.rows):
            size = (str(group.rank), str(group.batch_size)) if several else ()
            style = "bold" if j == rows.baseline else ""
            out.add_row(*size, *(_text(cell) for cell in row), style=style)
    return out


def _text(cell: Cell) -> Text:
    if cell.kind == "verdict":
        return Text(cell.text, VERDICTS.get(cell.text, ""))
    return Text(f"{cell.text} [{cell.note}]" if cell.note else cell.text)
