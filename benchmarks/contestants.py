"""What is timed: a method of ours, or PEFT's, on a copy of one model, with one step of training."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import common
import peft
import peft.optimizers
import torch
from common import saved_bytes
from torch import nn

import loralab

R, LR = 8, 1e-5  # so small that no method leaves its starting region while it is timed
C3A_BLOCK = 256  # our default on the benchmark's layers: the greatest divisor of both sides
Optimizer = Callable[[Any], torch.optim.Optimizer]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return the fastest AdamW that torch has on a CPU, which is also the HF Trainer's default."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)


def plus(model: peft.PeftModel) -> torch.optim.Optimizer:
    return peft.optimizers.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=16.0, fused=True
    )


def frozen_a(model: peft.PeftModel) -> torch.optim.Optimizer:
    return peft.optimizers.create_lorafa_optimizer(model, r=R, lora_alpha=R, lr=LR)


def lora_config(**more: Any) -> Any:
    return peft.LoraConfig(r=R, lora_alpha=R, **more)


def riemannian(model: peft.PeftModel) -> torch.optim.Optimizer:
    from peft.optimizers.riemannian import create_riemannian_optimizer

    return create_riemannian_optimizer(model, torch.optim.AdamW, lr=LR, reg=1e-6, fused=True)


# Our name: (PEFT's config, its optimizer), as large as ours. `full` has no adapter there: the
# base's own training.
PEFT: dict[str, tuple[Callable[[], Any] | None, Optimizer]] = {
    "lora": (lora_config, adamw),
    "rslora": (lambda: lora_config(use_rslora=True), adamw),
    "lora_plus": (lora_config, plus),
    "lora_fa": (lora_config, frozen_a),
    "rplora": (lora_config, riemannian),
    "dora": (lambda: lora_config(use_dora=True), adamw),
    "pissa": (lambda: lora_config(init_lora_weights="pissa"), adamw),
    "olora": (lambda: lora_config(init_lora_weights="olora"), adamw),
    "adalora": (
        lambda: peft.AdaLoraConfig(init_r=12, target_r=R, total_step=10**6, lora_alpha=R),
        adamw,
    ),
    "boft": (lambda: peft.BOFTConfig(boft_block_size=R, boft_n_butterfly_factor=2), adamw),
    "c3a": (lambda: peft.C3AConfig(block_size=C3A_BLOCK, init_weights=True), adamw),
    "delora": (lambda: peft.DeloraConfig(r=R), adamw),
    "fourierft": (lambda: peft.FourierFTConfig(n_frequency=1000), adamw),
    "glora": (lambda: peft.GloraConfig(r=R, config_C="none", config_D_E="none"), adamw),
    "gralora": (lambda: peft.GraloraConfig(r=R, alpha=R, gralora_k=2), adamw),
    "hira": (lambda: peft.HiraConfig(r=R), adamw),
    "hra": (lambda: peft.HRAConfig(r=R), adamw),
    "ia3": (lambda: peft.IA3Config(feedforward_modules=["down_proj"]), adamw),
    "loha": (lambda: peft.LoHaConfig(r=R, alpha=R), adamw),
    "lokr": (lambda: peft.LoKrConfig(r=R, alpha=R), adamw),
    "miss": (lambda: peft.MissConfig(r=R), adamw),
    "oft": (lambda: peft.OFTConfig(oft_block_size=R, use_cayley_neumann=False), adamw),
    "randlora": (lambda: peft.RandLoraConfig(r=R, randlora_alpha=R), adamw),
    "road": (lambda: peft.RoadConfig(variant="road_1", group_size=2), adamw),
    "shira": (lambda: peft.ShiraConfig(r=R), adamw),
    "tinylora": (lambda: peft.TinyLoraConfig(r=R, u=64), adamw),
    "vb_lora": (lambda: peft.VBLoRAConfig(r=R, num_vectors=256, vector_length=256), adamw),
    "vera": (lambda: peft.VeraConfig(r=R), adamw),
    "waveft": (lambda: peft.WaveFTConfig(n_frequency=2592), adamw),
    "full": (None, adamw),
}
# In PEFT these differ from LoRA in the start alone, so one step of theirs is one of its LoRA's.
PEFT |= {name: PEFT["lora"] for name in ("corda", "eva", "loftq", "lora_ga")}


@dataclasses.dataclass
class Contestant:
    """A model with something to train, and one step of training it."""

    model: nn.Module
    loss: Callable[[], torch.Tensor]
    optimizer: torch.optim.Optimizer
    after: Callable[[], Any] = lambda: None
    state: Callable[[], list[torch.Tensor]] = list
    closure: bool = False  # hand the backward pass to the optimizer, which may want it again

    def step(self) -> None:
        """Forward, backward, update; gradients are dropped, as both libraries' users do."""
        if self.closure:
            self.optimizer.step(self._backward)
        else:
            self._backward()
            self.optimizer.step()
        self.after()
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def memory(self, base: set[str]) -> dict[str, int]:
        """Return bytes: kept for backward, adapter (frozen tensors too), optimizer, rise.

        The rise is that of the allocator within a step, temporaries and gradients included.
        """
        saved = saved_bytes(self.model, self.loss)
        self.step()
        rise = common.allocator_peak(self.step)
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        adapter = {id(t): t for name, t in named if plain_name(name) not in base or t.requires_grad}
        found = {"kept": saved, "adapter": bytes_of(adapter.values())}
        return found | {"optimizer": bytes_of(self.state()), "rise": rise}

    def n_parameters(self) -> int:
        """Return how many numbers are trained."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def bytes_of(tensors: Any) -> int:
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def ours(base: nn.Module, name: str, batch: dict[str, torch.Tensor]) -> Contestant:
    model = copy.deepcopy(base)
    adapter = loralab.adapt(model, name, rank=R, data=[batch])

    def loss() -> torch.Tensor:
        value, penalty = model(**batch).loss, adapter.penalty()
        return value if penalty is None else value + penalty

    optimizer = adapter.optimizer(LR, n_steps=10**6, held_out=loss)

    def state() -> list[torch.Tensor]:
        return [t for t in optimizer.state_dict()["loralab"].values()]

    return Contestant(model, loss, optimizer, state=state, closure=True)


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

    return Contestant(model, lambda: model(**batch).loss, optimizer, after=after, state=state)
