"""Rows of a data file with the number that a person would look for, and their split."""

import csv
import gzip
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loralab.errors import UserError
from loralab.seeds import generator

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SPLIT_WORDS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


@dataclass(frozen=True)
class Row:
    """One item: its fields and where it stands ("train.jsonl, row 7")."""

    fields: dict[str, Any]
    place: str


def read_rows(path: Path) -> list[Row]:
    """Return the rows of one file; rows are counted from 1, a JSONL row is its line.

    A JSON or JSONL value that is text alone becomes {"text": ...}. A name may end in ".gz".

    Raises:
        UserError: missing, unreadable, malformed or empty file, or an unknown suffix.
    """
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in SUFFIXES:
        raise UserError(f"{path} is not one of {', '.join(SUFFIXES)}")
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(f"the data file {path} cannot be read: {said}") from None
    if suffix == ".parquet":
        rows = _parquet(data, path)
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from None
        reader = {".jsonl": _jsonl, ".json": _json}.get(suffix)
        rows = reader(text, path) if reader else _table(text, path, suffix)
    if not rows:
        raise UserError(f"the data file {path} has no rows")
    return rows


def split_files(
    folder: Path, suffixes: tuple[str, ...] = SUFFIXES, prefix: str = ""
) -> dict[str, Path]:
    """Return the file of each split in a folder, told by the words in their names.

    Args:
        prefix: files whose names begin with it are preferred to all others.

    Raises:
        UserError: no training file, or two for one split.
    """
    endings = (*suffixes, *(f"{suffix}.gz" for suffix in suffixes))
    files = [file for file in sorted(folder.iterdir()) if file.name.lower().endswith(endings)]
    files = [file for file in files if file.name.startswith(prefix)] or files
    found: dict[str, Path] = {}
    for file in files:
        words = set(re.split(r"[._-]", file.name.lower()))
        for split, names in SPLIT_WORDS.items():
            if not words.intersection(names):
                continue
            if split in found:
                raise UserError(
                    f"{folder} has two files for {split}: {found[split].name} and {file.name}; "
                    f"name one with the option {split}="
                )
            found[split] = file
    if "train" not in found:
        raise UserError(
            f"{folder} has no training file ({', '.join(suffixes)} with 'train' in its name)"
        )
    return found


def order(n: int, *seed: object) -> list[int]:
    """Return a permutation of n fixed by the seed parts."""
    return torch.randperm(n, generator=generator("split", *seed)).tolist()


def _jsonl(text: str, path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{path}, row {number}"
            try:
                rows.append(_row(json.loads(line), place))
            except json.JSONDecodeError as error:
                raise UserError(f"{place}: not JSON ({error.msg}, column {error.colno})") from None
    return rows


def _json(text: str, path: Path) -> list[Row]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: not JSON ({error.msg}, line {error.lineno}, column {error.colno})"
        ) from None
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list)]
        data = lists[0] if len(lists) == 1 else None
    if not isinstance(data, list):
        raise UserError(f"{path} must hold a list of rows")
    return [_row(value, f"{path}, row {number}") for number, value in enumerate(data, 1)]


def _table(text: str, path: Path, suffix: str) -> list[Row]:
    lines = io.StringIO(text, newline="")
    if suffix == ".tsv":
        reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.DictReader(lines)
    try:
        return [Row(dict(row), f"{path}, row {number}") for number, row in enumerate(reader, 1)]
    except csv.Error as error:
        raise UserError(f"{path}, row {reader.line_num}: {error}") from None


def _parquet(data: bytes, path: Path) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(io.BytesIO(data))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from None
    return [Row(row, f"{path}, row {number}") for number, row in enumerate(table.to_pylist(), 1)]


def _row(value: Any, place: str) -> Row:
    if isinstance(value, str):
        return Row({"text": value}, place)
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected an object with named fields, not {value!r:.40}")
    return Row(value, place)
