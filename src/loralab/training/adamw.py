"""AdamW over packs (arXiv 1711.05101): the Rule most methods keep."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loralab.bounds import Decay, Positive
from loralab.recipe import Hyper, Rule, SiteState


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
    p, g, m, v, lr, decay, fix1 = ([] for _ in range(7))
    owned = [s.t for s in sites]
    for s, tensors in zip(sites, owned, strict=True):
        if "steps" not in s.state:
            s.state["steps"] = torch.zeros_like(hyper.lr)
            for name, tensor in tensors.items():
                s.state["m." + name] = torch.zeros_like(tensor)
                s.state["v." + name] = torch.zeros_like(tensor)
    # Numbers per slot are worked out for all sites at once: single ones cost as much as a layer.
    torch._foreach_add_([s.state["steps"] for s in sites], 1)
    steps = torch.stack([s.state["steps"] for s in sites]).double()
    # In fp32, 1 - beta2 keeps only three or four digits.
    one, two = (1 - beta1**steps).to(hyper.lr), (1 - beta2**steps).rsqrt().to(hyper.lr)
    rates = {rule.lr_ratio(name): hyper.lr for tensors in owned for name in tensors}
    rates = {ratio: base * ratio for ratio, base in rates.items()}
    signed = {ratio: -rate / one for ratio, rate in rates.items()}
    kept = {ratio: 1 - rate * hyper.weight_decay for ratio, rate in rates.items()}
    for i, (s, tensors) in enumerate(zip(sites, owned, strict=True)):
        for name, tensor in tensors.items():
            ratio = rule.lr_ratio(name)
            p.append(tensor)
            g.append(s.g[name])
            m.append(s.state["m." + name])
            v.append(s.state["v." + name])
            lr.append(per_slot(signed[ratio][i], tensor))
            fix1.append(per_slot(two[i], tensor))
            decay.append(per_slot(kept[ratio], tensor))
    torch._foreach_lerp_(m, g, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, value=1 - beta2)
    denominator = torch._foreach_sqrt(v)
    torch._foreach_mul_(denominator, fix1)
    torch._foreach_add_(denominator, eps)
    if bool((hyper.weight_decay != 0).any()):
        torch._foreach_mul_(p, decay)
    update = torch._foreach_div(m, denominator)
    torch._foreach_mul_(update, lr)
    torch._foreach_add_(p, update)
