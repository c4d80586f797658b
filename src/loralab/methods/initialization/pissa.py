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
:verified: installed PEFT's code and the survey arXiv 2601.22708
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.recipe import Evidence, Site, Start, Tensors


def split_triplets(U: Tensor, S: Tensor, Vh: Tensor, scale: float) -> Tensors:
    """Return B = U √(S/s), A = √(S/s) Vᵀ, so that s B A = U S Vᵀ for every s > 0.

    Raises:
        UserError: s is not positive.
    """
    if not scale > 0:
        raise UserError(f"singular triplets are split with a positive alpha; the scale is {scale}")
    root = (S / scale).sqrt()
    return {"A": root[:, None] * Vh, "B": U * root}


def fast_svd(
    W: Tensor, rank: int, niter: int, generator: torch.Generator, oversample: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading triplets U [m, r], S [r], Vᵀ [r, n] by subspace iteration.

    Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4: a Gaussian sketch and `niter` power
    iterations, each orthonormalised. Deterministic by `generator`.
    """
    width = min(rank + oversample, *W.shape)
    sketch = torch.randn(W.shape[1], width, generator=generator, dtype=torch.float64).to(W)
    Q = torch.linalg.qr(W @ sketch).Q
    for _ in range(niter):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ W, full_matrices=False)
    return Q @ U[:, :rank], S[:rank], Vh[:rank]


@dataclass(frozen=True)
class PiSSA(Start):
    """The r leading singular triplets of W.

    Args:
        niter: power iterations of the fast SVD (the paper's appendix and PEFT use 4 to 64); None
            for the exact SVD.
    """

    anchored = True

    niter: int | None = None

    @property
    def seeded(self) -> bool:  # type: ignore[override]
        """The exact SVD draws nothing."""
        return self.niter is not None

    def __post_init__(self) -> None:
        if self.niter is not None and (not isinstance(self.niter, int) or self.niter < 0):
            raise UserError(f"niter of PiSSA counts power iterations, so it is not {self.niter!r}")

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        W, r = evidence.weight, site.rank
        if self.niter is None:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            U, S, Vh = U[:, :r], S[:r], Vh[:r]
        else:
            U, S, Vh = fast_svd(W, r, self.niter, evidence.generator("sketch"))
        return split_triplets(U, S, Vh, evidence.scale)


register("pissa", "initialization", __doc__, LoRA(), start=PiSSA())
