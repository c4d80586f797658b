"""GSM8K (arXiv 2110.14168): school mathematics in words; the answer ends in `#### number`."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from loralab.errors import UserError
from loralab.tasks.rows import Row
from loralab.tasks.text import TextTask, load_text

HUB = {"hub": True, "config": "main"}


def final_number(answer: str) -> str:
    """Return the number after the last `####`, else the last number, without commas; "" if none."""
    marked = answer.rpartition("####")[2]
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", marked)
    if not found:
        return ""
    number = (found[0] if "####" in answer else found[-1]).replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def without_annotations(row: Row) -> Row:
    """Return the row without the calculator's marks, such as <<48/2=24>>, in its answer."""
    answer = row.fields.get("answer")
    if not isinstance(answer, str):
        return row
    return Row(row.fields | {"answer": re.sub(r"<<[^<>]*>>", "", answer)}, row.place)


def load_gsm8k(
    path: str | None, tokenizer: Any, model: nn.Module | None, options: Mapping[str, Any]
) -> TextTask:
    """Return GSM8K from a folder with gsm8k_train.jsonl and gsm8k_test.jsonl, or from the hub.

    The default metric is the answer's likelihood, which small models can be compared by; "exact
    match" compares the final number. Validation rows are cut from the training rows.

    Args:
        options: those of TextSpec, and annotations (true): keep the calculator's marks.
    """
    rest = {name: value for name, value in options.items() if name != "annotations"}
    annotations = options.get("annotations", True)
    if not isinstance(annotations, bool):
        raise UserError(
            f"option 'annotations' of task 'gsm8k' must be true or false, not {annotations!r}"
        )
    local = path is not None or "train" in options
    return load_text(
        path if local else "openai/gsm8k",
        tokenizer,
        model,
        rest if local else HUB | rest,
        "gsm8k",
        final_number,
        None if annotations else without_annotations,
    )
