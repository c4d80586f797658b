"""A method's page of the catalogue, read from the docstring of its file.

The docstring says what the file does; its last lines are fields, `:name: text`, a text going on in
further lines: `summary`, `equation`, `trap` (any number), `title`, `authors`, `source` (where, year
and formula, as in "arXiv 2402.09353, 2024: eqs. 5 and 11") and `verified`.
"""

import re
from collections import defaultdict

from loralab.catalogue import Paper
from loralab.errors import UserError

FIELD = re.compile(r"^:(\w+): (.*(?:\n(?!:\w+: ).+)*)", re.MULTILINE)
SOURCE = re.compile(r"(?:arXiv (?P<arxiv>\d{4}\.\d{4,5})|(?P<venue>.+?)), (?P<year>\d{4}): (.+)")
ONCE = ("summary", "equation", "title", "authors", "source", "verified")


def fields(name: str, doc: str | None) -> dict[str, list[str]]:
    """Return the texts of every field, on one line each. Python's -OO leaves none.

    Raises:
        UserError: a field that is missing, unknown or there twice.
    """
    if doc is None:
        return {field: [""] for field in ONCE} | {"source": ["unknown, 0000: unknown"]}
    found = defaultdict(list)
    for field, text in FIELD.findall(doc):
        found[field].append(" ".join(text.split()))
    for field in ONCE:
        if len(found[field]) != 1 or not found[field][0]:
            raise UserError(f"the docstring of method {name!r} needs one line `:{field}: ...`")
    if unknown := found.keys() - {*ONCE, "trap"}:
        raise UserError(f"the docstring of method {name!r} has an unknown field {min(unknown)!r}")
    return found


def paper(name: str, found: dict[str, list[str]]) -> Paper:
    """Return the paper that the fields name.

    Raises:
        UserError: the source is not of the form "arXiv NUMBER, YEAR: formula".
    """
    source = SOURCE.fullmatch(found["source"][0])
    if source is None:
        raise UserError(
            f"the source of method {name!r} is not of the form 'arXiv NUMBER, YEAR: formula' or "
            f"'VENUE, YEAR: formula': {found['source'][0]!r}"
        )
    return Paper(
        title=found["title"][0],
        authors=found["authors"][0],
        year=int(source["year"]),
        arxiv=source["arxiv"] or "",
        venue=source["venue"] or "",
        equation=source[4],
        verified=found["verified"][0],
    )
