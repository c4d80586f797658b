"""The embedded default: a tiny Llama that is pre-trained on first use, so no download is needed.

It learns six operations on short strings of letters (`symbols.OPERATIONS`), shorter strings first.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from loralab.models.symbols import N_LETTERS, OPERATIONS, VOCABULARY, SymbolTokenizer, apply
from loralab.seeds import generator, stable_seed

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Progress = Callable[[float, str], None]
WEIGHTS, RECIPE = "model.safetensors", "recipe.json"


@dataclass(frozen=True)
class TinyRecipe:
    """Everything that decides the base's weights; its hash names the cache folder.

    Args:
        operations: names of what is learned, each equally often.
        min_length, max_length: letters per string; the longest are reached after `grow` of the
            steps.
        lr: peak of a one-cycle schedule for AdamW, 10 % warm-up, cosine to zero.
    """

    width: int = 64
    layers: int = 3
    heads: int = 4
    mlp_width: int = 192
    operations: tuple[str, ...] = tuple(OPERATIONS)
    min_length: int = 3
    max_length: int = 6
    grow: float = 0.35
    steps: int = 1500
    batch_size: int = 32
    lr: float = 3e-3
    seed: int = 0
    version: int = 1  # raised whenever the code below would give other weights

    @property
    def key(self) -> str:
        """Return 12 hexadecimal digits of the recipe's and the vocabulary's SHA-256."""
        text = json.dumps([dataclasses.asdict(self), VOCABULARY], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


# `tiny-quick` is pre-trained in a quarter of the time, for `loralab demo --quick` and tests.
RECIPES = {
    "tiny": TinyRecipe(),
    "tiny-quick": TinyRecipe(
        layers=2, operations=("reverse", "shift", "swap", "sort"), max_length=4, steps=500
    ),
}


def tiny_base(
    progress: Progress | None = None, recipe: TinyRecipe = TinyRecipe()
) -> tuple["LlamaForCausalLM", SymbolTokenizer]:
    """Return the tiny base in evaluation mode and its tokenizer, from the cache if it is there.

    Args:
        progress: called with (fraction done, message) while the base is pre-trained.
        recipe: what to pre-train.

    A damaged cache entry is built again. Where the cache cannot be written, the base is built in
    memory and a warning says so.
    """
    folder = cache_folder() / f"tiny-{recipe.key}"
    model = _read(folder, recipe)
    if model is None:
        model = pretrain(recipe, progress)
        try:
            _write(model, folder, recipe)
        except OSError as error:
            if _read(folder, recipe) is None:  # else another process wrote it just now
                warnings.warn(
                    f"the tiny base is not cached in {folder} ({error}), so the next run "
                    "pre-trains it again; set LORALAB_CACHE to a folder that can be written",
                    stacklevel=2,
                )
    return model.eval(), SymbolTokenizer()


def cache_folder() -> Path:
    """Return `$LORALAB_CACHE`, else `loralab` in the user's cache folder."""
    if chosen := os.environ.get("LORALAB_CACHE"):
        return Path(chosen).expanduser()
    home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or home
    return Path(base) / "loralab"


def lines(operations: tuple[str, ...], n: int, length: int, rng: torch.Generator) -> Tensor:
    """Return `n` random lines as tokens [n, 2 * length + 3], operations drawn uniformly."""
    tokenizer = SymbolTokenizer()
    first = tokenizer.encode("a")[0]
    which = torch.randint(len(operations), (n,), generator=rng)
    letters = torch.randint(N_LETTERS, (n, length), generator=rng)
    answers = torch.stack([apply([name], letters) for name in operations])[which, torch.arange(n)]
    tags = torch.tensor(tokenizer.encode(" ".join(operations)))[which].unsqueeze(-1)
    equals = torch.full_like(tags, tokenizer.encode("=")[0])
    end = torch.full_like(tags, tokenizer.eos_token_id)
    return torch.cat([tags, letters + first, equals, answers + first, end], -1)


def untrained(recipe: TinyRecipe) -> "LlamaForCausalLM":
    """Return the architecture with weights drawn from N(0, 1 / fan-in), each by its own name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = SymbolTokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp_width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws weights that are replaced below
        torch.manual_seed(stable_seed(recipe.seed))
        model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                rng = generator("tiny", recipe.seed, name)
                weight.copy_(torch.randn(weight.shape, generator=rng) * recipe.width**-0.5)
    return model


@contextmanager
def _one_thread() -> Iterator[None]:
    """So small a model gains little from more threads, and loses tenfold on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.enable_grad()
@_one_thread()
def pretrain(recipe: TinyRecipe, progress: Progress | None = None) -> "LlamaForCausalLM":
    """Return a freshly pre-trained base: AdamW on the answers of random lines.

    Bit for bit the same every time with a given torch on a given processor.
    """
    model = untrained(recipe).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=recipe.steps + 1, pct_start=0.1
    )
    rng = generator("tiny", recipe.seed, "lines")
    for step in range(recipe.steps):
        grown = min(1.0, step / max(1, recipe.grow * recipe.steps))
        longest = recipe.min_length + round(grown * (recipe.max_length - recipe.min_length))
        length = int(torch.randint(recipe.min_length, longest + 1, (1,), generator=rng))
        ids = lines(recipe.operations, recipe.batch_size, length, rng)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=length + 2).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, -length - 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress((step + 1) / recipe.steps, "pre-training the tiny base (once, then cached)")
    return model


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(model: "LlamaForCausalLM", folder: Path, recipe: TinyRecipe) -> None:
    from safetensors.torch import save_file

    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".tiny-", dir=folder.parent))
    try:
        save_file(model.state_dict(), draft / WEIGHTS, metadata={"format": "pt"})
        (draft / "config.json").write_text(model.config.to_json_string())
        record: dict[str, Any] = {"recipe": dataclasses.asdict(recipe)}
        record["sha256"] = _digest(draft / WEIGHTS)
        (draft / RECIPE).write_text(json.dumps(record, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _read(folder: Path, recipe: TinyRecipe) -> "LlamaForCausalLM | None":
    """Return the cached base, or None if it is absent or damaged."""
    from safetensors.torch import load_file

    try:
        record = json.loads((folder / RECIPE).read_text())
        if record["sha256"] != _digest(folder / WEIGHTS):
            return None
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    model = untrained(recipe)
    model.load_state_dict(weights)
    return model
