"""`loralab eval` and `loralab generate`: a saved adapter at work."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from loralab.cli.inputs import adapter_folder, open_model, tell_notes
from loralab.cli.output import Answer, Command
from loralab.cli.train import RECORD, default_device, score_of, score_text
from loralab.errors import UserError
from loralab.training.progress import Progress

EVAL_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Eval(Command):
    """Score an adapter on a task, and the base beside it if asked."""

    adapter: Positional[Path]
    """the adapter's folder, written by loralab or by PEFT"""
    task: str
    """a task's name, a data file, or a Hugging Face data set"""
    model: str | None = None
    """the base; what the adapter was trained on by default"""
    split: Literal["train", "validation", "test"] = "test"
    """which part of the data"""
    base: bool = False
    """score the bare base as well"""

    def run(self) -> Answer:
        """Return mean, standard error and number of items."""
        from loralab.core.adapter import load
        from loralab.tasks import load_task

        ref = base_of(adapter_folder(self.adapter), self.model)
        model, processor = open_model(ref, device=default_device())
        task = load_task(self.task, processor, model)
        tell_notes(task)
        adapter = load(model, self.adapter)
        scores = {"adapter": score_of(_scores(adapter.model, task, self.split, "adapter"))}
        if self.base:
            with adapter.disable():
                scores["base"] = score_of(_scores(adapter.model, task, self.split, "base"))
        data = {
            "adapter": self.adapter,
            "model": ref,
            "task": self.task,
            "split": self.split,
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
            "scores": scores,
        }
        title = f"{self.split} {task.metric}"
        lines = [f"{title}, {who}: {score_text(score)}" for who, score in scores.items()]
        return Answer(data, "\n".join(lines))


@dataclass(frozen=True, kw_only=True)
class Generate(Command):
    """Continue a prompt greedily with an adapter."""

    adapter: Positional[Path]
    """the adapter's folder, written by loralab or by PEFT"""
    prompt: str
    """the text to continue"""
    model: str | None = None
    """the base; what the adapter was trained on by default"""
    max_new_tokens: int = 64
    """at most so many tokens"""

    def run(self) -> Answer:
        """Return the continuation."""
        import torch

        from loralab.core.adapter import load
        from loralab.training.generate import greedy

        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens must be at least 1, not {self.max_new_tokens}")
        ref = base_of(adapter_folder(self.adapter), self.model)
        model, tokenizer = open_model(ref, device=default_device())
        if not hasattr(tokenizer, "encode"):
            raise UserError(f"model {ref!r} has no tokenizer, so it cannot continue a text")
        load(model, self.adapter)
        ids = tokenizer.encode(self.prompt)
        if not ids:
            raise UserError("--prompt gives no token; write at least one word")
        learned = any("wpe" in n or "position" in n for n, _ in model.named_parameters())
        room = getattr(model.config, "max_position_embeddings", None)  # rotary ones have no end
        if learned and room is not None and len(ids) + self.max_new_tokens > room:
            raise UserError(
                f"the prompt's {len(ids)} tokens and --max-new-tokens {self.max_new_tokens} are "
                f"more than the {room} positions of {ref!r}; make one of them smaller"
            )
        end = getattr(tokenizer, "eos_token_id", None)
        pad = getattr(tokenizer, "pad_token_id", None)
        out = greedy(
            model,
            torch.tensor([ids], device=next(model.parameters()).device),
            max_new_tokens=self.max_new_tokens,
            eos_token_ids=[] if end is None else [end],
            pad_token_id=next((i for i in (pad, end) if i is not None), 0),
        )[0].tolist()
        kept = out[: out.index(end)] if end in out else out
        text = tokenizer.decode(kept)
        return Answer({"prompt": self.prompt, "text": text, "n_tokens": len(kept)}, text)


def base_of(folder: Path, given: str | None) -> str:
    """Return the reference of the base model: `given`, or what the adapter's folder names.

    Raises:
        UserError: neither says it, or the files are not JSON.
    """
    if given is not None:
        return given
    for name, key in ((RECORD, "model"), ("adapter_config.json", "base_model_name_or_path")):
        file = folder / name
        if file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8")).get(key)
            except (ValueError, AttributeError) as error:
                raise UserError(f"{str(file)!r} is not a JSON object ({error})") from None
            if found:
                return str(found)
    raise UserError(f"{str(folder)!r} does not say which base it belongs to; add --model")


def _scores(model: Any, task: Any, split: str, name: str) -> Any:
    """Return the metric of every item, [n]."""
    import torch

    n = task.size(split)
    parts = []
    model.eval()
    with Progress() as progress, torch.no_grad():
        progress.expect(n)
        advance = progress.pack(f"eval {name}", n, 1)
        for low in range(0, n, EVAL_ROWS):
            items = list(range(low, min(low + EVAL_ROWS, n)))
            parts.append(task.scores(model, split, items, 1)[0].float().cpu())
            advance(items[-1] + 1, n, [])
    return torch.cat(parts)
