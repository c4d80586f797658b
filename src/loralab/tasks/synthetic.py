"""The demo's task: tags that the tiny base has never seen stand for compositions of what it knows.

`#1 a c b = ...` must be answered by, say, the reversed and shifted string. The adapter has to find
out from examples what each tag means; an answer counts if every generated token is right.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loralab.errors import UserError
from loralab.models.symbols import N_LETTERS, TAGS, SymbolTokenizer, apply
from loralab.seeds import generator
from loralab.tasks.base import Batch, Task, tile, to_device
from loralab.training.generate import greedy

IGNORED = -100


@dataclass(frozen=True)
class SyntheticSpec:
    """What is asked, and how much of it.

    Args:
        compositions: the meaning of tags `#1`, `#2`, ...: operations applied from left to right.
        length: letters per string.
        n_train, n_validation, n_test: items per split; no line is in two splits.
        seed: decides the strings of all splits.
    """

    compositions: tuple[tuple[str, ...], ...] = (
        ("reverse", "shift"),
        ("sort", "reverse"),
        ("swap", "reverse"),
    )
    length: int = 6
    n_train: int = 2048
    n_validation: int = 256
    n_test: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for split in ("n_train", "n_validation", "n_test"):
            if getattr(self, split) < 1:
                raise UserError(
                    f"{split} of the synthetic task counts its items from 1 on, so it is not "
                    f"{getattr(self, split)}"
                )
        total = self.n_train + self.n_validation + self.n_test
        if not 1 <= len(self.compositions) <= len(TAGS):
            raise UserError(f"the synthetic task needs 1 to {len(TAGS)} compositions")
        if total > len(self.compositions) * N_LETTERS**self.length // 2:
            raise UserError(
                f"the synthetic task cannot draw {total} different lines of length {self.length}; "
                "raise `length` or ask for fewer items"
            )


# `synthetic-quick` is meant for the base `tiny-quick`.
SPECS = {
    "synthetic": SyntheticSpec(),
    "synthetic-quick": SyntheticSpec(
        compositions=(("reverse", "shift"), ("sort", "reverse")),
        length=4,
        n_train=1024,
        n_validation=256,
        n_test=512,
    ),
}


class SyntheticTask(Task):
    """Exact match of greedily generated answers; the loss is cross entropy on answer tokens."""

    name: str = "synthetic"
    metric: str = "exact match"

    def __init__(
        self, tokenizer: SymbolTokenizer | None = None, spec: SyntheticSpec = SyntheticSpec()
    ) -> None:
        self.tokenizer = tokenizer or SymbolTokenizer()
        self.spec = spec
        rows = _distinct_rows(spec)
        ends = [0, spec.n_train, spec.n_train + spec.n_validation, len(rows)]
        lines = _lines(rows, spec, self.tokenizer)
        self._splits = {
            split: lines[a:b]
            for split, a, b in zip(("train", "validation", "test"), ends, ends[1:], strict=False)
        }

    def size(self, split: str) -> int:
        """Return the number of items of the split."""
        return len(self._rows(split))

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        """Return `input_ids` and `labels` (of answers only), each [rows, 2 * length + 3]."""
        ids = self._rows(split)[list(indices)]
        labels = ids.clone()
        labels[:, : self.prompt_length] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed cross entropy of each row's answer and the number of its tokens."""
        labels = batch["labels"][:, 1:]
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        each = cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return each.view(labels.shape).sum(-1), (labels != IGNORED).sum(-1)

    @torch.no_grad()
    def scores(self, model: nn.Module, split: str, indices: Sequence[int], copies: int) -> Tensor:
        """Return 1 where the generated answer is right to the last token, [copies, n]."""
        device = next(model.parameters()).device
        ids = to_device({"ids": self._rows(split)[list(indices)]}, device)["ids"]
        prompts = ids[:, : self.prompt_length]
        wanted = ids[:, self.prompt_length :]
        got = greedy(
            model,
            tile({"ids": prompts}, copies)["ids"],
            max_new_tokens=wanted.shape[-1],
            eos_token_ids=[self.tokenizer.eos_token_id],
            pad_token_id=self.tokenizer.pad_token_id,
        )
        if got.shape[-1] < wanted.shape[-1]:  # every row ended early: none can be right
            return torch.zeros(copies, len(ids), device=device)
        return (got.view(copies, *wanted.shape) == wanted).all(-1).float()

    @property
    def prompt_length(self) -> int:
        """Return the number of tokens before the answer."""
        return self.spec.length + 2

    def _rows(self, split: str) -> Tensor:
        if split not in self._splits:
            raise UserError(f"unknown split {split!r}; the splits are {', '.join(self._splits)}")
        return self._splits[split]


def _distinct_rows(spec: SyntheticSpec) -> Tensor:
    """Return distinct (composition, letters) rows, [n, 1 + length], in random order."""
    total = spec.n_train + spec.n_validation + spec.n_test
    rng = generator("synthetic", spec.seed)
    seen: dict[tuple[int, ...], None] = {}
    while len(seen) < total:
        which = torch.randint(len(spec.compositions), (total, 1), generator=rng)
        letters = torch.randint(N_LETTERS, (total, spec.length), generator=rng)
        seen.update(dict.fromkeys(map(tuple, torch.cat([which, letters], -1).tolist())))
    return torch.tensor(list(seen)[:total])


def _lines(rows: Tensor, spec: SyntheticSpec, tokenizer: SymbolTokenizer) -> Tensor:
    which, letters = rows[:, 0], rows[:, 1:]
    answers = torch.stack([apply(names, letters) for names in spec.compositions])
    answers = answers[which, torch.arange(len(rows))]
    tags = torch.tensor(tokenizer.encode(" ".join(TAGS)))[which].unsqueeze(-1)
    first = tokenizer.encode("a")[0]
    equals = torch.full_like(tags, tokenizer.encode("=")[0])
    end = torch.full_like(tags, tokenizer.eos_token_id)
    return torch.cat([tags, letters + first, equals, answers + first, end], -1)
