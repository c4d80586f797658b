"""Riemannian preconditioned LoRA (scaled AdamW): ∇A ← (BᵀB + δI)⁻¹ ∇A and ∇B ← ∇B (AAᵀ + δI)⁻¹
before an AdamW step.

The preconditioner is the metric of the space of rank-r matrices; it makes the step of B A
independent of how B A is split. Both factors are those at which the gradients were taken; the
authors' loop lets B see the new A.

:summary: AdamW whose gradients are scaled by the other factor's inverse Gram matrix
:equation: grad A <- (B^T B + d I)^-1 grad A, grad B <- grad B (A A^T + d I)^-1
:trap: Each gradient is scaled by the other factor, from the side of the rank.
:trap: PEFT's damping is 1e-2, ten thousand times the authors': there the scaling hardly acts while
    B is small.
:title: Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models
:authors: Fangzhao Zhang, Mert Pilanci
:source: arXiv 2402.02347, 2024: scaled AdamW (page 5 of version 3)
:verified: authors' code (pilancilab/Riemannian_Preconditioned_LoRA, Mistral-7B), the survey arXiv
    2601.22708, equality with installed PEFT's optimizer, and an extract of the paper's claims with
    their pages; the text itself was not to be had
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from loralab.bounds import Positive
from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.recipe import Hyper, SiteState
from loralab.training.adamw import AdamW
from loralab.training.gram import inverse_gram, with_gradients


@dataclass(frozen=True)
class ScaledAdamW(AdamW):
    """AdamW on preconditioned gradients of a pair; other tensors take plain AdamW.

    Args:
        damping: δ on both Gram matrices; 1e-6 in the authors' code, 1e-2 in PEFT.
    """

    pair_only: ClassVar[bool] = True
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    inverts: ClassVar[bool] = True

    damping: Positive = 1e-6
    eps: Positive = 1e-6

    def step(self, sites: Sequence[SiteState], hyper: Hyper) -> None:
        seen = []
        for site in sites:
            A, B = site.t["A"], site.t["B"]
            scaled = {
                "A": inverse_gram(B, self.damping).to(A) @ site.g["A"],
                "B": site.g["B"] @ inverse_gram(A.mT, self.damping).to(B),
            }
            seen.append(with_gradients(site, site.g | scaled))
        super().step(seen, hyper)


register("rplora", "optimization", __doc__, LoRA(), rule=ScaledAdamW(), aliases=("riemannian",))
