"""From prompts and answers to tokens of limited length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from loralab.errors import UserError
from loralab.tasks.layouts import Pair

METRICS = {"nll": False, "exact match": True}  # and whether higher is better


@dataclass(frozen=True)
class TextSpec:
    """What to read and how much of it.

    Args:
        prompt, answer: field names or templates such as "Q: {question} A:"; None detects them.
        train, validation, test: files, beside or instead of the reference's own.
        n_train, n_validation, n_test: items per split; None takes all there are. Splits without a
            file are cut from the training rows: 10 % each, at most 500, unless a number is given.
        max_length: tokens per row; None takes the model's positions, at most 512.
        overlong: "cut" shortens a prompt from the left to half the length, then the answer from
            the right; "drop" leaves such rows out.
        metric: "nll", the mean negative log-likelihood per answer token in nats, or "exact match"
            of the greedily generated answer.
        max_new_tokens: length of generated answers.
        seed: decides the split.
        hub, config: the data set comes from the hub, in this configuration.
    """

    prompt: str | None = None
    answer: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    n_train: int | None = None
    n_validation: int | None = None
    n_test: int | None = None
    max_length: int | None = None
    overlong: str = "cut"
    metric: str = "nll"
    max_new_tokens: int = 64
    seed: int = 0
    hub: bool = False
    config: str | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UserError(f"unknown metric {self.metric!r}; say {' or '.join(METRICS)}")
        if self.overlong not in ("cut", "drop"):
            raise UserError(f"overlong must be cut or drop, not {self.overlong!r}")
        for name in ("n_train", "n_validation", "n_test", "max_length", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < (2 if name == "max_length" else 1):
                raise UserError(f"{name} is too small: {value}")


@dataclass(frozen=True)
class Item:
    """A tokenised row; `ids[n_prompt:]` is the answer."""

    ids: tuple[int, ...]
    n_prompt: int
    answer: str


def encode(
    texts: Sequence[Pair], tokenizer: Any, spec: TextSpec, model: nn.Module | None
) -> tuple[list[Item], str]:
    """Return the items and a note on what was cut or dropped."""
    limit = spec.max_length or min(512, _positions(model))
    if limit > _positions(model):
        raise UserError(
            f"max_length {limit} is more than the model's {_positions(model)} positions"
        )
    prompts = _tokens(tokenizer, [pair.prompt for pair in texts])
    answers = _tokens(tokenizer, [pair.answer for pair in texts])
    start = getattr(tokenizer, "bos_token_id", None)
    end = getattr(tokenizer, "eos_token_id", None)
    kept, n_over = [], 0
    for pair, before, after in zip(texts, prompts, answers, strict=True):
        before = ([] if start is None else [start]) + before
        after = after + ([end] if end is not None and pair.prompt else [])
        if not before:  # the first token of a bare text is only context
            before, after = after[:1], after[1:]
        if not after:
            raise UserError(f"{pair.place}: the answer is empty")
        over = len(before) + len(after) > limit
        n_over += over
        if over and spec.overlong == "drop":
            continue
        if over:
            room = max(limit // 2, limit - len(after))
            if len(before) > room:  # BOS stays
                n_start = int(start is not None)
                before = before[:n_start] + before[len(before) - room + n_start :]
            after = after[: limit - len(before)]
        kept.append(Item((*before, *after), len(before), pair.answer))
    if not kept:
        raise UserError(f"all {len(texts)} rows are longer than max_length {limit}")
    verb = "left out" if spec.overlong == "drop" else "cut"
    note = f"{n_over} of {len(texts)} rows are longer than {limit} tokens and were {verb}"
    return kept, note if n_over else ""


def _positions(model: nn.Module | None) -> int:
    config = getattr(model, "config", None)
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def _tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not callable(tokenizer):
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
