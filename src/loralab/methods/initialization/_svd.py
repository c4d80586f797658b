"""What starts from singular vectors share: a matrix's triplets, chosen and halved."""

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.recipe import Evidence, Tensors

Triplets = tuple[Tensor, Tensor, Tensor]


def split_triplets(U: Tensor, S: Tensor, Vh: Tensor, scale: float) -> Tensors:
    """Return B = U √(S/s), A = √(S/s) Vᵀ, so that s B A = U S Vᵀ for every s > 0.

    Raises:
        UserError: s is not positive.
    """
    if not scale > 0:
        raise UserError(f"singular triplets are split with a positive alpha; the scale is {scale}")
    root = (S / scale).sqrt()
    return {"A": root[:, None] * Vh, "B": U * root}


def leading_triplets(M: Tensor, rank: int) -> Triplets:
    """Return the leading triplets U [m, r], S [r], Vᵀ [r, n]."""
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank]


def most_changed(W: Tensor, t: Tensors, k: int) -> tuple[Tensor, Tensor]:
    """Return the vectors U [K, m, k], Vᵀ [K, k, n] of W with the largest |u_iᵀ B A v_i| / σ_i."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    change = ((U.mT @ t["B"]).mT * (t["A"] @ Vh.mT)).sum(-2)
    rate = change.abs() / S.clamp_min(torch.finfo(S.dtype).tiny)
    top = rate.topk(k).indices
    return U.mT[top].mT, Vh[top]


def fast_svd(
    W: Tensor, rank: int, niter: int, generator: torch.Generator, oversample: int = 8
) -> Triplets:
    """Return about the leading triplets, by subspace iteration.

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


def triplets(
    M: Tensor, rank: int, niter: int | None, evidence: Evidence, oversample: int = 8
) -> Triplets:
    """Return the leading triplets by `niter` iterations of the fast SVD; None is the exact one."""
    if niter is None:
        return leading_triplets(M, rank)
    return fast_svd(M, rank, niter, evidence.generator("sketch"), oversample)
