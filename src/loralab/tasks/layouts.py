"""From a row's fields to a prompt and an answer."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loralab.errors import UserError, near_misses
from loralab.tasks.rows import Row


@dataclass(frozen=True)
class Pair:
    """What the model reads, what it should say, and where both came from."""

    prompt: str
    answer: str
    place: str = ""


# Needed fields, prompt template, answer template. The first whose fields a file has is taken.
LAYOUTS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("prompt", "completion"), "{prompt}", "{completion}"),
    (("instruction", "output"), "Instruction: {instruction}\nResponse:", " {output}"),
    (("question", "answer"), "Question: {question}\nAnswer:", " {answer}"),
    (("text",), "", "{text}"),
)


def pairs(
    rows: Sequence[Row], prompt: str | None, answer: str | None, tokenizer: Any
) -> list[Pair]:
    """Return one Pair per row.

    Args:
        prompt, answer: a field's name, or a template with fields in braces; None for both detects
            one of the known layouts (prompt/completion, instruction/output with or without an
            input, question/answer, text, messages) from the first row.
        tokenizer: renders `messages` by its chat template if it has one.

    Raises:
        UserError: no known layout, or a row without a needed field.
    """
    if prompt is None and answer is None:
        if "messages" in rows[0].fields:
            return [_conversation(row, tokenizer) for row in rows]
        prompt, answer = _detect(rows[0])
        if "{instruction}" in prompt:
            rows = [_with_input(row) for row in rows]
    elif answer is None:
        raise UserError("the option prompt needs the option answer beside it")
    before, after = _template(prompt or "", rows[0]), _template(answer, rows[0])
    return [Pair(_fill(before, row), _fill(after, row), row.place) for row in rows]


def _detect(row: Row) -> tuple[str, str]:
    for needed, prompt, answer in LAYOUTS:
        if all(name in row.fields for name in needed):
            return prompt, answer
    found = ", ".join(map(str, row.fields))
    expected = "; ".join("/".join(needed) for needed, _, _ in LAYOUTS)
    raise UserError(
        f"{row.place}: found the fields {found}, expected {expected} or messages; name yours with "
        "the options prompt= and answer="
    )


def _with_input(row: Row) -> Row:
    """Return the row with a non-empty `input` as a second paragraph of its instruction."""
    more, instruction = row.fields.get("input"), row.fields.get("instruction")
    if not more or instruction is None:
        return row
    return Row(row.fields | {"instruction": f"{instruction}\n{more}"}, row.place)


def _template(text: str, row: Row) -> str:
    """Return the text as a template: a bare word is a field's name."""
    if text and "{" not in text:
        return "{" + text + "}"
    return text


def _fill(template: str, row: Row) -> str:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    except ValueError as error:
        raise UserError(f"the template {template!r} is malformed: {error}") from None
    values = {}
    for name in names:
        value = row.fields.get(name)
        if value is None or isinstance(value, dict | list):
            what = "lacks" if value is None else "has no text in"
            hint = near_misses(name, row.fields) or f" (it has {', '.join(map(str, row.fields))})"
            raise UserError(f"{row.place}: the row {what} the field {name!r}{hint}")
        values[name] = str(value)
    return template.format(**values)


def _conversation(row: Row, tokenizer: Any) -> Pair:
    """Return everything up to the last assistant turn as prompt, and that turn as answer."""
    turns = row.fields.get("messages")
    if not isinstance(turns, list) or not all(
        isinstance(t, dict) and isinstance(t.get("content"), str) and "role" in t for t in turns
    ):
        raise UserError(f"{row.place}: the field 'messages' must be a list of role and content")
    last = max((i for i, t in enumerate(turns) if t["role"] == "assistant"), default=0)
    if not last:
        raise UserError(f"{row.place}: no assistant message after a first message")
    if getattr(tokenizer, "chat_template", None):
        prompt = tokenizer.apply_chat_template(
            turns[:last], tokenize=False, add_generation_prompt=True
        )
        return Pair(prompt, turns[last]["content"], row.place)
    lines = "".join(f"{t['role'].capitalize()}: {t['content']}\n" for t in turns[:last])
    return Pair(f"{lines}Assistant:", f" {turns[last]['content']}", row.place)
