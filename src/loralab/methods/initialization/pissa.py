"""PiSSA, arXiv 2404.02948, eqs. 2-4: W = U S Vᵀ, A = U_r S_r^½, B = S_r^½ V_rᵀ, W_res = W - A B.

The paper's A is our B and the reverse. The residual W_res is not stored: the start is anchored,
the update is s (B A - B0 A0), which is the same function and leaves W as it is.

:summary: Starts from the leading singular triplets of the weight
:equation: B0 = U_r sqrt(S_r/s), A0 = sqrt(S_r/s) V_r^T, dW = s (B A - B0 A0)
:trap: The scale divides S once: sqrt(S/s) in each factor, or s B0 A0 is not W's top part.
:trap: Large singular values make the loss sharp in A and B; the best rate is below LoRA's.
:title: PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models
:authors: Fanxu Meng, Zhaohui Wang, Muhan Zhang
:source: arXiv 2404.02948, 2024: eqs. 2-4, section 3
:verified: paper (eqs. 2 to 5), installed PEFT's code and the survey arXiv 2601.22708
"""

from dataclasses import dataclass

from loralab.bounds import CountOrZero
from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.methods.initialization._svd import split_triplets, triplets
from loralab.recipe import Evidence, Site, Start, Tensors


@dataclass(frozen=True)
class PiSSA(Start):
    """The r leading singular triplets of W.

    Args:
        niter: power iterations of the fast SVD (the paper's appendix and PEFT use 4 to 64); None
            for the exact SVD.
    """

    anchored = True

    niter: CountOrZero | None = None

    @property
    def seeded(self) -> bool:  # type: ignore[override]
        """The exact SVD draws nothing."""
        return self.niter is not None

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        U, S, Vh = triplets(evidence.weight, site.rank, self.niter, evidence)
        return split_triplets(U, S, Vh, evidence.scale)


register("pissa", "initialization", __doc__, LoRA(), start=PiSSA())
