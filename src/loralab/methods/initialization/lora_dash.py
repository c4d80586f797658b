"""LoRA-Dash: LoRA for t steps ("pre-launch"), then LoRA and Σ_i Δσ_i u_i v_iᵀ ("dash"), Δσ_i = 0 at
first and (u_i, v_i) singular vectors of W = U Σ Vᵀ, chosen once and frozen.

:summary: LoRA, later joined by trained changes along the directions of W it changed most
:equation: dW = s B A + sum_i d_i u_i v_i^T, (u, v) those of the k largest |u^T s B A v| / sigma
:trap: LoRA's own pair goes on: LoRAFactory's code drops it at the launch.
:trap: Directions are chosen by relative change, which favours small singular values.
:title: Unleashing the Power of Task-Specific Directions in Parameter Efficient Fine-tuning
:authors: Chongjie Si, Zhiyi Shi, Shifan Zhang, Xiaokang Yang, Hanspeter Pfister, Wei Shen
:source: arXiv 2409.01035, 2024: LoRA-Dash
:verified: authors' code (Chongjie-Si/Subspace-Tuning, tuners/lora-dash.py at cbff135) and the first
    author's write-up for the change rate and t; the paper's text could not be read
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import Count
from loralab.methods import register
from loralab.methods.expansion.lora import plain_pair
from loralab.methods.initialization._svd import leading_triplets, most_changed
from loralab.recipe import Evidence, Form, Schedule, Site, SiteState, Tensors


@dataclass(frozen=True)
class Dash(Form):
    """LoRA's pair and k trained singular value changes.

    Args:
        n_directions: k; at most the layer's smaller side is used.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "sigma", "U", "Vh"})
    frozen: ClassVar[frozenset[str]] = frozenset({"U", "Vh", "s"})

    n_directions: Count = 8

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [r, in], B [out, r] = 0, sigma [k] = 0, and W's first vectors for now."""
        U, S, Vh = leading_triplets(evidence.weight, self.n_directions)
        t = plain_pair(site, evidence) | {"U": U.contiguous(), "Vh": Vh.contiguous()}
        return t | {"sigma": torch.zeros_like(S), "s": S.new_full((1,), evidence.scale)}

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        U = t["U"] * (t["sigma"] / t["s"]).unsqueeze(-2)  # the core multiplies by s: not Δσ
        return torch.cat([t["B"], U], -1), torch.cat([t["A"], t["Vh"]], -2)


@dataclass(frozen=True)
class Launch(Schedule):
    """Hold the Δσ_i for some steps, then choose their directions once.

    Args:
        warmup: t, in updates; at most half of the run (our choice).
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"A", "B", "sigma", "U", "Vh"})
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B", "sigma"})
    changes: ClassVar[frozenset[str]] = frozenset({"U", "Vh"})

    warmup: Count = 100

    def before_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        if step < min(self.warmup, n_steps // 2):
            for site in sites:
                site.g["sigma"].zero_()

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        if step + 1 == min(self.warmup, n_steps // 2):
            for site in sites:
                U, Vh = most_changed(site.weight, site.t, site.t["sigma"].shape[-1])
                site.fixed["U"].copy_(U)
                site.fixed["Vh"].copy_(Vh)


register("lora_dash", "initialization", __doc__, Dash(), schedule=Launch())
