"""GSM8K (arXiv 2110.14168): school mathematics in words; the answer ends in `#### number`."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

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


def load_gsm8k(
    path: str | None, tokenizer: Any, model: nn.Module | None, options: Mapping[str, Any]
) -> TextTask:
    """Return GSM8K from a folder with gsm8k_train.jsonl and gsm8k_test.jsonl, or from the hub.

    The default metric is the answer's likelihood, which small models can be compared by; "exact
    match" compares the final number. Validation rows are cut from the training rows.
    """
    source = dict(options) if path or "train" in options else HUB | dict(options)
    place = path or (None if "train" in options else "openai/gsm8k")
    return load_text(place, tokenizer, model, source, "gsm8k", final_number)
