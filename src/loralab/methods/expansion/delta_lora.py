"""Delta-LoRA, arXiv 2309.02411, algorithm 1: W(t+1) = W(t) + λ (α/r) (B(t+1) A(t+1) - B(t) A(t)).

Beside A and B, after K steps, the weight moves by their change. (The paper writes A B for our B A.)
The steps add up to λ s (B A - B_K A_K) with the pair as it was when the motion began, so that W
stays as it is and two small frozen factors hold its motion: dW = s [B A + λ (B̄ Ā - B_K A_K)],
where the bars say that no gradient flows: to A and B the moving W is a constant.

:summary: The weight itself also moves, by the change of B A, without its own gradient
:equation: W <- W + lambda s (B' A' - B A) at each step after K; dW = that motion + s B A
:trap: The motion of W takes no part in the gradient: that of A and B is LoRA's, not (1 + lambda)
    times it.
:trap: The changes telescope: the motion has rank 2 r at most.
:trap: Within the first K steps it is LoRA; the paper's 500 suit its long runs.
:trap: The paper trains it without dropout, so that W and the pair see the same input.
:title: Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices
:authors: Bojia Zi, Xianbiao Qi, Lingzhi Wang, Jianan Wang, Kam-Fai Wong, Lei Zhang
:source: arXiv 2309.02411, 2023: algorithm 1
:verified: LoRAFactory, which quotes the algorithm, and the abstract; the paper's text was not to be
    had
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.core.stopgrad import stop_gradient
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import check_scaling, plain_pair, scale_of
from loralab.recipe import Evidence, Form, Schedule, Site, SiteState, Tensors


@dataclass(frozen=True)
class DeltaLoRA(Form):
    """A pair, and the motion that it hands on to W.

    Args:
        ratio: λ, how far W moves for a change of the product; 2 in the paper.
        scaling: as in LoRA.
    """

    # No `pair`: an anchor would be measured from the present A_K, B_K, and shift the motion.
    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "A_K", "B_K", "moving"})
    frozen: ClassVar[frozenset[str]] = frozenset({"A_K", "B_K", "moving"})
    rank_axis: ClassVar[Mapping[str, int]] = {"A": -2, "B": -1, "A_K": -2, "B_K": -1}

    ratio: float = 2.0
    scaling: str = "alpha/r"

    def __post_init__(self) -> None:
        check_scaling(self.scaling)
        if not self.ratio >= 0:
            raise UserError(f"ratio of Delta-LoRA must not be negative, not {self.ratio!r}")

    def scale(self, alpha: float, rank: int) -> float:
        return scale_of(self.scaling, alpha, rank)

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [r, in], B [out, r] = 0, the pair A_K, B_K = 0 and `moving` [1] = 0."""
        pair = plain_pair(site, evidence)
        return pair | {
            "A_K": torch.zeros_like(pair["A"]),
            "B_K": torch.zeros_like(pair["B"]),
            "moving": evidence.weight.new_zeros(1),
        }

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

    singles_out: ClassVar[frozenset[str]] = frozenset({"A", "B", "A_K", "B_K", "moving"})
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    changes: ClassVar[frozenset[str]] = frozenset({"A_K", "B_K", "moving"})

    start_steps: int | None = None

    def __post_init__(self) -> None:
        if self.start_steps is not None and self.start_steps < 0:
            raise UserError(f"start_steps of Delta-LoRA counts steps, not {self.start_steps!r}")

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        K = min(500, n_steps // 10) if self.start_steps is None else self.start_steps
        if step != K:
            return
        for site in sites:
            site.fixed["A_K"].copy_(site.t["A"])
            site.fixed["B_K"].copy_(site.t["B"])
            site.fixed["moving"].fill_(1.0)


register("delta_lora", "expansion", __doc__, DeltaLoRA(), schedule=StartMoving())
