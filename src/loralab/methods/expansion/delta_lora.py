"""Delta-LoRA: W(t+1) = W(t) + λ (α/r) (B(t+1) A(t+1) - B(t) A(t)), beside A and B, after K steps.

The paper writes A B for our B A. The steps add up, so that W stays as it is and two small frozen
factors, the pair as it was when the motion began, hold the motion:
dW = s [B A + λ (B̄ Ā - B_K A_K)], where the bars say that no gradient flows.

:summary: The weight itself also moves, by the change of B A, without its own gradient
:equation: W <- W + lambda s (B' A' - B A) at each step after K; dW = that motion + s B A
:trap: The gradient of A and B is LoRA's, not (1 + lambda) times it: W's motion is a constant.
:trap: The changes telescope: the motion has rank 2 r at most.
:trap: Within the first K steps it is LoRA; the paper's 500 (XSum: 1000) suit its long runs.
:trap: The paper trains it without dropout, so that W and the pair see the same input.
:title: Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices
:authors: Bojia Zi, Xianbiao Qi, Lingzhi Wang, Jianan Wang, Kam-Fai Wong, Lei Zhang
:source: arXiv 2309.02411, 2023: section 4, eq. 6, algorithm 1; sections 5.2 and 5.3 for λ and K
:verified: a Korean account of the paper, section by section with its equations, and LoRAFactory,
    which quotes the algorithm; the text itself was not to be had
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import CountOrZero, NonNegative
from loralab.core.stopgrad import stop_gradient
from loralab.methods import register
from loralab.methods.expansion.lora import Pair, plain_pair
from loralab.recipe import Evidence, Schedule, Site, SiteState, Tensors


@dataclass(frozen=True)
class DeltaLoRA(Pair):
    """A pair, and what it hands on to W: λ (`ratio`; 2 on E2E, 0.5 on GLUE) times its motion."""

    pair: ClassVar[bool] = False  # an anchor's frozen start, taken from A_K, B_K, would shift it
    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "A_K", "B_K", "moving"})
    frozen: ClassVar[frozenset[str]] = frozenset({"A_K", "B_K", "moving"})
    rank_axis: ClassVar[Mapping[str, int]] = {"A": -2, "B": -1, "A_K": -2, "B_K": -1}

    ratio: NonNegative = 2.0

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [r, in], B [out, r] = 0, the pair A_K, B_K = 0 and `moving` [1] = 0."""
        pair = plain_pair(site, evidence)
        still = {f"{name}_K": torch.zeros_like(factor) for name, factor in pair.items()}
        return pair | still | {"moving": evidence.weight.new_zeros(1)}

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        A, B, step = t["A"], t["B"], self.ratio * t["moving"].unsqueeze(-1)
        left = [B, step * stop_gradient(B), -step * t["B_K"]]
        return torch.cat(left, -1), torch.cat([A, stop_gradient(A), t["A_K"]], -2)


@dataclass(frozen=True)
class StartMoving(Schedule):
    """Let W move once the pair has settled.

    Args:
        start_steps: K. None takes the paper's 500, or a tenth of the run where that is less.
    """

    singles_out: ClassVar[frozenset[str]] = DeltaLoRA.owns
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    changes: ClassVar[frozenset[str]] = DeltaLoRA.frozen

    start_steps: CountOrZero | None = None

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        K = min(500, n_steps // 10) if self.start_steps is None else self.start_steps
        if step == K:
            for site in sites:
                site.fixed["A_K"].copy_(site.t["A"])
                site.fixed["B_K"].copy_(site.t["B"])
                site.fixed["moving"].fill_(1.0)


register("delta_lora", "expansion", __doc__, DeltaLoRA(), schedule=StartMoving())
