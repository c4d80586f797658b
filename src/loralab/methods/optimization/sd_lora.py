"""SD-LoRA: frozen, normalised directions of earlier tasks beside the present one (A B is our B A).

The present direction is not normalised while it is trained, as in the authors' code: with B = 0 it
has no norm, and step 0 is the base. All layers have the magnitudes in common (section 4.1), and all
of them begin each task at 1 (section 3.3; 0.8 in the code), which moves the function between tasks.
With magnitudes="site" each layer has its own, and restart_magnitudes=False lets α_t take the norm
over, so that the function stays. Section 3.5's variants, to save parameters, are not offered.

:summary: Continual learning: frozen directions of earlier tasks, magnitudes still trained
:equation: dW = s (alpha_1 B_1 A_1 / |B_1 A_1|_F + ... + alpha_t B_t A_t)
:trap: n_tasks must be the length of the sequence; on one task it is LoRA with a trained factor.
:trap: The old magnitudes go on being trained, the old directions never are.
:trap: The authors' code divides by |B|_F |A|_F, which is larger than the paper's |B A|_F; it is not
    offered, being a constant of a frozen direction that its trained magnitude takes up.
:title: SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning
:authors: Yichen Wu, Hongming Piao, Long-Kai Huang, Renzhen Wang, Wanhua Li, Hanspeter Pfister, Deyu
    Meng, Kede Ma, Ying Wei
:source: arXiv 2501.13198, 2025: eq. 4, algorithm 1
:verified: paper (sections 3 and 4.1) and authors' code (backbone/lora.py in a copy of
    WuYichen-97/SD-Lora-CL)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loralab.bounds import Count
from loralab.methods import register
from loralab.methods.expansion.lora import Pair
from loralab.methods.optimization._directions import OLD, NextDirection
from loralab.recipe import Evidence, Site, Tensors


@dataclass(frozen=True)
class Directions(Pair):
    """The present pair with its magnitude, and the frozen directions of the tasks before.

    Args:
        n_tasks: how many tasks there will be; all directions are there from the start.
        magnitudes: in common for the "model", or each "site" its own.
    """

    pair: ClassVar[bool] = False
    owns: ClassVar[frozenset[str]] = OLD | {"A", "B", "alpha", "alpha_old"}
    frozen: ClassVar[frozenset[str]] = OLD

    n_tasks: Count = 1
    magnitudes: Literal["model", "site"] = "model"

    @property
    def shared(self) -> Mapping[str, str]:  # type: ignore[override]
        names = ("alpha", "alpha_old") if self.n_tasks > 1 else ("alpha",)
        return dict.fromkeys(names, "model") if self.magnitudes == "model" else {}

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A, B and alpha [1] = 1, and room for the directions of n_tasks - 1 tasks."""
        t = super().init(site, evidence) | {"alpha": evidence.weight.new_ones(1)}
        if n := self.n_tasks - 1:
            t["A_old"] = evidence.weight.new_zeros(n * site.rank, site.d_in)
            t["B_old"] = evidence.weight.new_zeros(site.d_out, n * site.rank)
            t["alpha_old"] = evidence.weight.new_ones(n)
        return t

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        B, A = t["alpha"].unsqueeze(-1) * t["B"], t["A"]
        if "A_old" not in t:
            return B, A
        alpha = t["alpha_old"].repeat_interleave(A.shape[-2], -1).unsqueeze(-2)
        return torch.cat([B, alpha * t["B_old"]], -1), torch.cat([A, t["A_old"]], -2)


register("sd_lora", "optimization", __doc__, Directions(), schedule=NextDirection())
