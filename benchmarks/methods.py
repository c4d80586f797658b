"""Training step of each method against installed PEFT: time and memory, same model and batch.

One row is one group, timed in turns: ours, PEFT's (where it has the method) and our LoRA.
Run with `python benchmarks/methods.py [--quick]`.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import common
import peft
import peft.optimizers
import torch
from common import Spread, ratio, saved_bytes, spread
from torch import nn

import loralab
from loralab.methods import all_methods

R, LR = 8, 1e-5  # so small that no method leaves its starting region while it is timed
Optimizer = Callable[[Any], torch.optim.Optimizer]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return the fastest AdamW that torch has on a CPU, which is also the HF Trainer's default."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)


def plus(model: nn.Module) -> torch.optim.Optimizer:
    return peft.optimizers.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=16.0, fused=True
    )


def frozen_a(model: nn.Module) -> torch.optim.Optimizer:
    return peft.optimizers.create_lorafa_optimizer(model, r=R, lora_alpha=R, lr=LR)


def lora_config(**more: Any) -> Any:
    return peft.LoraConfig(r=R, lora_alpha=R, **more)


# Our name: (PEFT's config, its optimizer). `full` has no adapter there: the base's own training.
PEFT: dict[str, tuple[Callable[[], Any] | None, Optimizer]] = {
    "lora": (lora_config, adamw),
    "rslora": (lambda: lora_config(use_rslora=True), adamw),
    "lora_plus": (lora_config, plus),
    "lora_fa": (lora_config, frozen_a),
    "dora": (lambda: lora_config(use_dora=True), adamw),
    "pissa": (lambda: lora_config(init_lora_weights="pissa"), adamw),
    "olora": (lambda: lora_config(init_lora_weights="olora"), adamw),
    "loha": (lambda: peft.LoHaConfig(r=R, alpha=R), adamw),
    "vera": (lambda: peft.VeraConfig(r=R), adamw),
    "randlora": (lambda: peft.RandLoraConfig(r=R, randlora_alpha=R), adamw),
    "gralora": (lambda: peft.GraloraConfig(r=R, alpha=R, gralora_k=2), adamw),
    "adalora": (
        lambda: peft.AdaLoraConfig(init_r=12, target_r=R, total_step=10**6, lora_alpha=R),
        adamw,
    ),
    "full": (None, adamw),
}


@dataclasses.dataclass
class Contestant:
    """A model with something to train, and one step of training it."""

    model: nn.Module
    loss: Callable[[], torch.Tensor]
    optimizer: torch.optim.Optimizer
    after: Callable[[], Any] = lambda: None
    state: Callable[[], list[torch.Tensor]] = list

    def step(self) -> None:
        """Forward, backward, update; gradients are dropped, as both libraries' users do."""
        self.loss().backward()
        self.optimizer.step()
        self.after()
        self.optimizer.zero_grad(set_to_none=True)

    def memory(self, base: set[str]) -> dict[str, int]:
        """Return bytes: kept for backward, adapter (frozen tensors too), optimizer, peak."""
        self.step()
        peak = common.allocator_peak(self.step)
        saved = saved_bytes(self.model, self.loss)
        self.optimizer.zero_grad(set_to_none=True)
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        adapter = {id(t): t for name, t in named if plain_name(name) not in base or t.requires_grad}
        found = {"kept": saved, "adapter": bytes_of(adapter.values())}
        return found | {"optimizer": bytes_of(self.state()), "peak": peak}


def bytes_of(tensors: Any) -> int:
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def ours(base: nn.Module, name: str, batch: dict[str, torch.Tensor]) -> Contestant:
    model = copy.deepcopy(base)
    adapter = loralab.adapt(model, name, rank=R, data=[batch])
    optimizer = adapter.optimizer(LR, n_steps=10**6)

    def loss() -> torch.Tensor:
        value, penalty = model(**batch).loss, adapter.penalty()
        return value if penalty is None else value + penalty

    def state() -> list[torch.Tensor]:
        return [t for t in optimizer.state_dict()["loralab"].values()]

    return Contestant(model, loss, optimizer, state=state)


def theirs(base: nn.Module, name: str, batch: dict[str, torch.Tensor]) -> Contestant:
    config, make = PEFT[name]
    model = copy.deepcopy(base)
    after: Callable[[], Any] = lambda: None  # noqa: E731
    if config is None:
        for part, p in model.named_parameters():
            p.requires_grad_("_proj" in part)
    else:
        chosen = config()
        chosen.target_modules, chosen.task_type = "all-linear", "CAUSAL_LM"
        model = peft.get_peft_model(model, chosen)
        if isinstance(chosen, peft.AdaLoraConfig):
            after = lambda: model.base_model.update_and_allocate(1)  # noqa: E731
    optimizer = make(model)

    def state() -> list[torch.Tensor]:
        found = [v for s in optimizer.state.values() for v in s.values()]
        return [v for v in found if isinstance(v, torch.Tensor)]

    return Contestant(model, lambda: model(**batch).loss, optimizer, after, state)


def measure(base: nn.Module, name: str, batch: Any, repeats: int) -> dict[str, Any]:
    """Return times and memory of one group."""
    group = {"ours": ours(base, name, batch)}
    if name in PEFT:
        group["peft"] = theirs(base, name, batch)
    if name != "lora":
        group["lora"] = ours(base, "lora", batch)
    names = {n for n, _ in [*base.named_parameters(), *base.named_buffers()]}
    memory = {who: c.memory(names) for who, c in group.items()}
    times = common.interleaved({who: c.step for who, c in group.items()}, repeats)
    return {"method": name, "seconds": times, "memory": memory}


def row(found: dict[str, Any]) -> dict[str, str]:
    """Return one line of the table."""
    times, memory = found["seconds"], found["memory"]
    total = {w: m["kept"] + m["adapter"] + m["optimizer"] for w, m in memory.items()}
    lora = "lora" if "lora" in times else "ours"

    def against(other: str) -> tuple[str, str, str]:
        if other not in times:
            return "", "", ""
        time: Spread = ratio(times["ours"], times[other])
        peak = memory["ours"]["peak"] / memory[other]["peak"]
        return time.text(), f"{total['ours'] / total[other]:.2f}", f"{peak:.2f}"

    mine, kept = spread(times["ours"]), memory["ours"]["kept"]
    columns = {"method": found["method"], "step, ms": f"{1e3 * mine.median:.1f}"}
    columns |= {"kept, MiB": f"{kept / 2**20:.1f}", "total, MiB": f"{total['ours'] / 2**20:.1f}"}
    columns["peak, MiB"] = f"{memory['ours']['peak'] / 2**20:.1f}"
    for head, other in (("PEFT", "peft"), ("our LoRA", lora)):
        heads = (f"time / {head}", f"total / {head}", f"peak / {head}")
        columns |= dict(zip(heads, against(other), strict=True))
    return columns


NOTE = """Step: forward, backward and update of all linear layers but the head, r = 8, {rows} x
{length} tokens. Ratios are ours / other within a round: median (quartiles). *Kept*: distinct
storages that autograd holds for backward, weights left out. *Total*: kept + adapter (its frozen
tensors too) + optimizer memory. *Peak*: rise of the allocator in one step, temporaries and
gradients included. PEFT runs its defaults with torch's fused AdamW; for `full` the other side is
the plain model with its own weights trained."""


def main() -> None:
    only = {"nargs": "*", "default": [], "help": "methods; all if none"}
    args = common.arguments(__doc__, only=only)
    before, repeats = common.record(), 3 if args.quick else 25
    base = common.llama(256, 4, 688)
    ids = torch.randint(1024, (2, 256))
    batch, figures, sections = {"input_ids": ids, "labels": ids}, {}, {}
    few = ["lora", "dora", "pissa", "vera"]
    for dtype, names in ((torch.float32, list(all_methods())), (torch.bfloat16, few)):
        model = copy.deepcopy(base).to(dtype)
        chosen = [n for n in names if not args.only or n in args.only]
        key = str(dtype).removeprefix("torch.")
        figures[key] = [measure(model, n, batch, repeats) for n in chosen]
        if figures[key]:
            sections[f"Base in {key}"] = common.table([row(f) for f in figures[key]])
    sections["How it is measured"] = NOTE.format(rows=len(ids), length=ids.shape[-1])
    common.write("methods", args.out, before, figures, sections)


if __name__ == "__main__":
    main()
