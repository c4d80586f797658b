"""Tasks by reference: a name, a data file, or a data set on the hub."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from loralab.errors import UserError, near_misses
from loralab.references import expand, parse, spec_from
from loralab.tasks.base import Task

# Builders take (path or None, processor, model, options).
Builder = Callable[[str | None, Any, nn.Module | None, dict[str, Any]], Task]


def load_task(
    ref: str, processor: Any = None, model: nn.Module | None = None, **options: Any
) -> Task:
    """Return the task that `ref` names.

    Args:
        ref: a task's name, with a folder or file after ":" where the task has local data
            ("gsm8k:FOLDER"); a JSONL, JSON, CSV, TSV or Parquet file, or a folder of them; an
            .npz file of images; or the id of a data set on the hub. Options follow "?":
            "gsm8k:FOLDER?max_length=128".
        processor: the tokenizer or ImageStatistics that `load_model` returned.
        model: the base that will be adapted; its limits (positions, image size, classes) are
            checked against the data.
        options: the same options as keywords; they win.

    Raises:
        UserError: no such task, file or data set; a row without the needed field; no data left.
    """
    target, own = parse(ref)
    name, colon, path = target.partition(":")
    chosen = own | options
    if name in TASKS:
        return TASKS[name](expand(path) if colon else None, processor, model, chosen)
    place = Path(expand(target))
    if place.suffix == ".npz":
        return _images(str(place), processor, model, chosen)
    if place.exists() or place.suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        return _text(str(place), processor, model, chosen)
    if colon or target.count("/") != 1 or target.startswith(("/", ".", "~", "$")):
        known = near_misses(name, TASKS) or f"; the named tasks are {', '.join(sorted(TASKS))}"
        raise UserError(f"there is no task, file or folder {target!r}{known}")
    return _text(target, processor, model, chosen | {"hub": True})


def _synthetic(
    path: str | None, processor: Any, model: Any, options: dict[str, Any], name: str = "synthetic"
) -> Task:
    from loralab.models.symbols import SymbolTokenizer
    from loralab.tasks.synthetic import SPECS, SyntheticSpec, SyntheticTask

    if path is not None:
        raise UserError(f"the task {name!r} is generated and reads no file")
    if processor is not None and not isinstance(processor, SymbolTokenizer):
        raise UserError(f"the task {name!r} is written in the symbols of the model 'tiny' only")
    chosen = vars(SPECS[name]) | options
    return SyntheticTask(processor, spec_from(SyntheticSpec, chosen, f"task {name}"))


def _text(path: str | None, processor: Any, model: Any, options: dict[str, Any]) -> Task:
    from loralab.tasks.text import load_text

    return load_text(path, processor, model, options)


def _gsm8k(path: str | None, processor: Any, model: Any, options: dict[str, Any]) -> Task:
    from loralab.tasks.gsm8k import load_gsm8k

    return load_gsm8k(path, processor, model, options)


def _images(path: str | None, processor: Any, model: Any, options: dict[str, Any]) -> Task:
    from loralab.tasks.images import load_images

    return load_images(path, processor, model, options)


def _cifar10(path: str | None, processor: Any, model: Any, options: dict[str, Any]) -> Task:
    from loralab.tasks.images import load_images

    return load_images(path, processor, model, {"hub": "uoft-cs/cifar10"} | options, "cifar10")


TASKS: dict[str, Builder] = {
    "synthetic": _synthetic,
    "synthetic-quick": partial(_synthetic, name="synthetic-quick"),
    "text": _text,
    "gsm8k": _gsm8k,
    "images": _images,
    "cifar10": _cifar10,
}
