"""SoRA: dW = s W_u diag(g) W_d with gates g that become exactly 0.

Each step ends with the proximal one of λ‖g‖₁: g ← T_ξ(g - η ∇L), T_ξ(x) = sign(x) max(|x| - ξ, 0),
ξ = η_t λ. The authors' scripts have one ξ (3e-4), one of their files multiplies it by the learning
rate (`times_lr`), and they add 10 mean|g| to the loss and threshold twice, which is not done here.

:summary: A gate on each rank, pulled to exactly zero by a soft threshold
:equation: dW = s B diag(g) A, g <- sign(g') max(|g'| - xi, 0)
:trap: The rank asked for is the largest one; how many stay depends on xi times the number of steps.
:trap: As a term of the loss under Adam the threshold would never give exact zeros.
:title: Sparse Low-rank Adaptation of Pre-trained Language Models
:authors: Ning Ding, Xingtai Lv, Qiaosen Wang, Yulin Chen, Bowen Zhou, Zhiyuan Liu, Maosong Sun
:source: arXiv 2311.11696, 2023: section 3, without the scheduler that raises ξ (algorithm 1)
:verified: authors' code and issue 1 (TsinghuaC3I/SoRA: src/*.py); the text was not to be had
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.bounds import NonNegative
from loralab.methods import register
from loralab.methods.budgeting._gates import DropClosed
from loralab.methods.expansion.lora import normal, plain_pair
from loralab.recipe import Evidence, Form, Hyper, Site, SiteState, Tensors
from loralab.training.adamw import AdamW


@dataclass(frozen=True)
class SoRA(Form):
    """LoRA with a gate on each rank; the rank asked for is r_max."""

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "gate"})
    rank_axis: ClassVar[Mapping[str, int]] = {"A": -2, "B": -1, "gate": -1}

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [r, in] and B [out, r] = 0 as LoRA's, and gate [r] ~ N(0, 1)."""
        return plain_pair(site, evidence) | {"gate": normal(evidence, "gate", site.rank, std=1.0)}

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return t["B"], t["gate"].unsqueeze(-1) * t["A"]


@dataclass(frozen=True)
class ProximalAdamW(AdamW):
    """AdamW, then the soft threshold for the gates, which have no weight decay.

    Args:
        xi: ξ, what each step takes from |g|.
        times_lr: multiply ξ by the step's learning rate.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"gate"})

    xi: NonNegative = 3e-4
    times_lr: bool = False

    def step(self, sites: Sequence[SiteState], hyper: Hyper) -> None:
        """Step every tensor, then take ξ from the gates of the slots that move."""
        undecayed = [s.t["gate"] * (hyper.lr * hyper.weight_decay)[:, None] for s in sites]
        super().step(sites, hyper)
        xi = self.xi * (hyper.lr if self.times_lr else (hyper.lr > 0).to(hyper.lr))
        for site, back in zip(sites, undecayed, strict=True):
            x = site.t["gate"] + back
            site.t["gate"].copy_(x.sign() * (x.abs() - xi[:, None]).clamp_min(0))


@dataclass(frozen=True)
class DropZeroGates(DropClosed):
    """Remove the ranks whose gate is 0."""

    singles_out: ClassVar[frozenset[str]] = frozenset({"A", "B", "gate"})

    def open(self, site: SiteState) -> Tensor:
        return site.t["gate"] != 0


register("sora", "budgeting", __doc__, SoRA(), rule=ProximalAdamW(), schedule=DropZeroGates())
