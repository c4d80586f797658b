"""Any file of prompts and answers: the loss and, by default, the score are the answer's likelihood.

Only answer tokens count. A row is `[BOS] prompt answer [EOS]`: the BOS where the tokenizer has one,
the EOS where there is a prompt (so that generation learns to stop).
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralab.errors import UserError
from loralab.references import expand, spec_from
from loralab.tasks.base import Batch, Task, tile, to_device
from loralab.tasks.encoding import METRICS, Item, TextSpec, encode
from loralab.tasks.layouts import pairs
from loralab.tasks.likelihood import IGNORED, head_stands_alone, row_losses
from loralab.tasks.rows import Row, order, read_rows, split_files

SPLITS = ("train", "validation", "test")


class TextTask(Task):
    """Prompts and answers under a causal language model.

    Attributes:
        notes: what was cut or left out, a sentence each.
    """

    def __init__(
        self,
        name: str,
        splits: Mapping[str, Sequence[Item]],
        tokenizer: Any,
        spec: TextSpec,
        model: nn.Module | None = None,
        notes: Sequence[str] = (),
        extract: Callable[[str], str] = str.strip,
    ) -> None:
        """Take tokenised splits; `extract` gives the part of an answer that must match."""
        self.name = name
        self.metric = spec.metric
        self.higher_is_better = METRICS[spec.metric]
        self.notes = tuple(notes)
        self.tokenizer = tokenizer
        self.spec = spec
        self._splits = dict(splits)
        self._extract = extract
        self._pad = next(
            (
                i
                for a in ("pad_token_id", "eos_token_id")
                if (i := getattr(tokenizer, a, None)) is not None
            ),
            0,
        )
        self._proved = (
            weakref.ref(model) if model is not None and head_stands_alone(model) else None
        )

    def size(self, split: str) -> int:
        """Return the number of items of the split."""
        return len(self._items(split))

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        """Return `input_ids`, `attention_mask` and `labels`, each [rows, longest], right-padded."""
        items = self._items(split)
        rows = [items[i] for i in indices]
        width = max((len(row.ids) for row in rows), default=0)
        ids = torch.full((len(rows), width), self._pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = torch.tensor(row.ids)
            mask[i, : len(row.ids)] = 1
            labels[i, row.n_prompt : len(row.ids)] = ids[i, row.n_prompt : len(row.ids)]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return each row's summed answer loss in nats and its number of answer tokens, [rows]."""
        sparse = self._proved is not None and self._proved() is model
        return row_losses(model, batch, sparse)

    @torch.no_grad()
    def scores(self, model: nn.Module, split: str, indices: Sequence[int], copies: int) -> Tensor:
        """Return nats per answer token, or 1 for an exact match, as [copies, n]."""
        device = next(model.parameters()).device
        if self.metric == "nll":
            batch = tile(to_device(self.batch(split, indices), device), copies)
            total, count = self.losses(model, batch)
            return (total / count).view(copies, -1)
        return self._matches(model, split, indices, copies, device)

    def _matches(
        self, model: nn.Module, split: str, indices: Sequence[int], copies: int, device: Any
    ) -> Tensor:
        from loralab.training.generate import greedy

        rows = [self._items(split)[i] for i in indices]
        width = max(row.n_prompt for row in rows)
        ids = torch.full((len(rows), width), self._pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - row.n_prompt :] = torch.tensor(row.ids[: row.n_prompt])
            mask[i, width - row.n_prompt :] = 1
        batch = tile(to_device({"ids": ids, "mask": mask}, device), copies)
        end = getattr(self.tokenizer, "eos_token_id", None)
        out = greedy(
            model,
            batch["ids"],
            batch["mask"],
            max_new_tokens=self.spec.max_new_tokens,
            eos_token_ids=[] if end is None else [end],
            pad_token_id=self._pad,
        )
        wanted = [self._extract(row.answer) for row in rows] * copies
        right = [
            self._extract(_decode(self.tokenizer, row, end)) == answer
            for row, answer in zip(out.tolist(), wanted, strict=True)
        ]
        return torch.tensor(right, dtype=torch.float32, device=device).view(copies, -1)

    def _items(self, split: str) -> Sequence[Item]:
        if split not in self._splits:
            raise UserError(f"unknown split {split!r}; the splits are {', '.join(self._splits)}")
        return self._splits[split]


def load_text(
    path: str | None,
    tokenizer: Any,
    model: nn.Module | None,
    options: Mapping[str, Any],
    name: str | None = None,
    extract: Callable[[str], str] = str.strip,
    rewrite: Callable[[Row], Row] | None = None,
) -> TextTask:
    """Return the task of a file, a folder of files or a hub data set.

    Args:
        name: of the task; in a folder, files whose names begin with it are preferred.
        extract: gives the part of an answer that must match exactly.
        rewrite: changes each row before it is read.

    Raises:
        UserError: no tokenizer, unreadable data, a row without a needed field, an empty split.
    """
    if tokenizer is None or not hasattr(tokenizer, "encode"):
        raise UserError("a text task needs a language model with its tokenizer")
    title = name or (Path(path).stem if path else "text")
    spec = spec_from(TextSpec, options, f"task {title!r}")
    sources = _sources(path, spec, name or "")
    if rewrite is not None:
        sources = {split: [rewrite(row) for row in rows] for split, rows in sources.items()}
    read = {
        split: encode(pairs(rows, spec.prompt, spec.answer, tokenizer), tokenizer, spec, model)
        for split, rows in sources.items()
    }
    items = {split: kept for split, (kept, _) in read.items()}
    notes = [f"{split}: {note}" for split, (_, note) in read.items() if note]
    return TextTask(title, _divide(items, spec), tokenizer, spec, model, notes, extract)


def _sources(path: str | None, spec: TextSpec, prefix: str) -> dict[str, list[Row]]:
    if spec.hub and path is not None:
        from loralab.tasks.hub import hub_rows

        return hub_rows(path, spec.config)
    files: dict[str, Path] = {}
    if path is not None:
        place = Path(path)
        files = split_files(place, prefix=prefix) if place.is_dir() else {"train": place}
    for split in SPLITS:
        if (named := getattr(spec, split)) is not None:
            files[split] = Path(expand(named))
    if "train" not in files:
        raise UserError("a text task needs a file: give a path, or the option train=")
    return {split: read_rows(file) for split, file in files.items()}


def _divide(items: dict[str, list[Item]], spec: TextSpec) -> dict[str, list[Item]]:
    """Return all three splits in a fixed random order, cutting the absent ones from train."""
    mixed = {s: [rows[i] for i in order(len(rows), s, spec.seed)] for s, rows in items.items()}
    rest, out = mixed["train"], {}
    for split in ("test", "validation"):
        n = getattr(spec, f"n_{split}")
        if split in mixed:
            out[split] = mixed[split][:n]
        else:
            n = n or min(500, max(1, len(mixed["train"]) // 10))
            out[split], rest = rest[:n], rest[n:]
        _enough(len(out[split]), n, split)
    _enough(len(rest), spec.n_train, "train")
    return {"train": rest[: spec.n_train], "validation": out["validation"], "test": out["test"]}


def _enough(found: int, wanted: int | None, split: str) -> None:
    if found < max(1, wanted or 0):
        raise UserError(
            f"the {split} split has {found} rows where {wanted or 'at least 1'} are needed; "
            "give more data or ask for fewer items"
        )


def _decode(tokenizer: Any, ids: list[int], end: int | None) -> str:
    if end in ids:
        ids = ids[: ids.index(end)]
    return tokenizer.decode(ids)
