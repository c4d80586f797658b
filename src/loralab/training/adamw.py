"""AdamW over packs (arXiv 1711.05101): the Rule most methods keep."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loralab.bounds import Decay, Positive
from loralab.recipe import Hyper, Rule, SiteState

FUSED_SIZE = 2048  # numbers of one slot's tensor, on average, from which the fused kernel pays


def per_slot(vector: Tensor, like: Tensor) -> Tensor:
    """Return [K] `vector` shaped [K, 1, ...] to broadcast over `like` [K, ...]."""
    return vector.view(-1, *(1,) * (like.dim() - 1))


@dataclass(frozen=True)
class AdamW(Rule):
    """Decoupled weight decay Adam; the step count is per slot, so a restart can reset it."""

    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: Positive = 1e-8

    def step(self, sites: Sequence[SiteState], hyper: Hyper) -> None:
        """Apply one AdamW step to every tensor of every site."""
        adamw_step(self, sites, hyper, self.beta1, self.beta2, self.eps)


def adamw_step(
    rule: Rule, sites: Sequence[SiteState], hyper: Hyper, beta1: float, beta2: float, eps: float
) -> None:
    """Advance all tensors together; `rule` supplies the per-tensor learning-rate ratios."""
    parts = []
    for s in sites:
        tensors = s.t
        if "steps" not in s.state:
            s.state["steps"] = torch.zeros_like(hyper.lr)
            for name, tensor in tensors.items():
                s.state["m." + name] = torch.zeros_like(tensor)
                s.state["v." + name] = torch.zeros_like(tensor)
        for name, tensor in tensors.items():
            own = (s.g[name], s.state["m." + name], s.state["v." + name], s.state["steps"])
            parts.append(_Part(rule.lr_ratio(name), tensor, *own))
    torch._foreach_add_([s.state["steps"] for s in sites], 1)
    step = _by_slot if _fits(parts, len(hyper.lr)) else _all_slots
    step(parts, hyper, beta1, beta2, eps)


class _Part(NamedTuple):
    """A tensor [K, ...], its gradient and moments, its rate over the slot's, its steps [K]."""

    ratio: float
    p: Tensor
    g: Tensor
    m: Tensor
    v: Tensor
    steps: Tensor


def _fits(parts: Sequence[_Part], n_slots: int) -> bool:
    """Return whether torch's fused kernel can make the step, and is the faster way.

    It is one pass where `_all_slots` is ten, but takes some 20 µs for each slot of each tensor. The
    two differ in rounding, and so may the last trial of a pack once it is alone.
    """
    tensors = [t for part in parts for t in part[1:5]]
    if not tensors or tensors[0].device.type not in ("cpu", "cuda"):
        return False
    if n_slots > 1 and sum(t.numel() for t in tensors) < FUSED_SIZE * len(tensors) * n_slots:
        return False
    first = tensors[0]
    alike = all(t.dtype == first.dtype and t.device == first.device for t in tensors)
    return alike and first.is_floating_point() and all(t.is_contiguous() for t in tensors)


def _by_slot(parts: Sequence[_Part], hyper: Hyper, beta1: float, beta2: float, eps: float) -> None:
    """Step slot after slot by torch's fused kernel."""
    slots = list(zip(hyper.lr.tolist(), hyper.weight_decay.tolist(), strict=True))
    for ratio in dict.fromkeys(part.ratio for part in parts):
        own = [
            [t.unbind() for t in (*part[1:5], part.steps.float())]
            for part in parts
            if part.ratio == ratio
        ]
        for k, (lr, decay) in enumerate(slots):
            p, g, m, v, steps = (
                [views[k] for views in column] for column in zip(*own, strict=True)
            )
            torch._fused_adamw_(
                p, g, m, v, [], steps, lr=lr * ratio, beta1=beta1, beta2=beta2,
                weight_decay=decay, eps=eps, amsgrad=False, maximize=False,
            )  # fmt: skip


def _all_slots(
    parts: Sequence[_Part], hyper: Hyper, beta1: float, beta2: float, eps: float
) -> None:
    """Step all slots of a tensor at once."""
    _, p, g, m, v, _ = (list(column) for column in zip(*parts, strict=True))
    # Numbers per slot are worked out for all tensors at once: single ones cost as much as a layer.
    # In fp32, 1 - beta2 keeps only three or four digits.
    steps = torch.stack([part.steps for part in parts]).double()
    rates = steps.new_tensor([[part.ratio] for part in parts]) * hyper.lr

    def spread(numbers: Tensor) -> list[Tensor]:
        by_dtype = {dtype: numbers.to(dtype) for dtype in {t.dtype for t in p}}
        return [per_slot(by_dtype[t.dtype][i], t) for i, t in enumerate(p)]

    lr, fix = spread(-rates / (1 - beta1**steps)), spread((1 - beta2**steps).rsqrt())
    torch._foreach_lerp_(m, g, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, value=1 - beta2)
    denominator = torch._foreach_sqrt(v)
    torch._foreach_mul_(denominator, fix)
    torch._foreach_add_(denominator, eps)
    if bool((hyper.weight_decay != 0).any()):
        torch._foreach_mul_(p, spread(1 - rates * hyper.weight_decay))
    update = torch._foreach_div(m, denominator)
    torch._foreach_mul_(update, lr)
    torch._foreach_add_(p, update)
