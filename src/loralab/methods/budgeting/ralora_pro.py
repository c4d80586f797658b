"""RaLoRA-Pro (ICLR 2026, OpenReview kObvnQ6pUx): RaLoRA's blocks on ranks that differ by layer.

r_l = ⌊P α_l / √(d_in + d_out)⌋ within [r_min, r_max], P = Σ_l √(d_in + d_out) r_ref, α_l GoRA's
share of mean |W ∘ G| (arXiv 2502.12171); then n_l from erank(G_l) / r_l as in RaLoRA.

:summary: RaLoRA with ranks that follow mean |W ∘ G| from layer to layer
:equation: r_l = floor(P a_l / sqrt(d_in + d_out)), n_l = 2^floor(log2(erank(G_l) / r_l))
:trap: The number of blocks follows from the layer's own rank, not from the one asked for.
:trap: r_min and r_max are GoRA's (half and four times the rank asked for).
:trap: The total is held up to rounding down and the bounds.
:title: Gradient Intrinsic Dimensionality Alignment: Narrowing The Gap Between Low-Rank Adaptation
    and Full Fine-Tuning
:authors: Jingqi Ye, Haonan He, Minglei Li, Fujun Han, Tao Chen, Peng Ye
:source: ICLR 2026 (OpenReview kObvnQ6pUx), 2026: section 3
:verified: a public reading of the paper (papernotes, ICLR 2026) and the authors' code
    (hhnqqq/MyTransformers, ralora.py)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from loralab.bounds import OneOf
from loralab.methods import register
from loralab.methods.budgeting._evidence import Proportional, adalomo_step, sensitivity
from loralab.methods.budgeting.ralora import RaLoRA
from loralab.recipe import Evidence, Look, OwnStart, Site

IMPORTANCE: dict[str, Callable[[Evidence], float]] = {
    "gradient": lambda evidence: sensitivity(evidence, "RaLoRA-Pro"),
    "adalomo": lambda evidence: adalomo_step(evidence).norm().item(),
}


@dataclass(frozen=True)
class Sensitivity(OwnStart, Proportional):
    """Ranks in proportion to each layer's importance; the tensors are the Form's own.

    Args:
        importance: "gradient" for mean |W ∘ G|, "adalomo" for the Frobenius norm of AdaLomo's step.
    """

    importance: Annotated[str, OneOf(IMPORTANCE)] = "gradient"

    def ranks(self, sites: Sequence[Site], evidence: Look) -> dict[str, int] | None:
        importance = {s.name: IMPORTANCE[self.importance](evidence(s)) for s in sites}
        return self.share_out(sites, importance, math.floor)


register("ralora_pro", "budgeting", __doc__, RaLoRA(), start=Sensitivity())
