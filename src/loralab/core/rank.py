"""The rank of the update that a bank has come to, restarts included."""

import torch
from torch import Tensor

from loralab.core.bank import Bank
from loralab.core.layers import wide


@torch.no_grad()
def update_rank(bank: Bank, weight: Tensor, slot: int, tolerance: float | None = None) -> int:
    """Return the numerical rank of W' - W [out, in] of one slot, computed in fp64.

    Two factors B A have the singular values of the small matrix R_B R_A^T, where B = Q_B R_B and
    A^T = Q_A R_A.

    Args:
        tolerance: as in `Adapter.ranks`.
    """
    eps = torch.finfo(wide(weight).dtype).eps
    floor = 0.0
    if bank.frames or bank.replaces or bank.gains:
        W = wide(weight).double()
        values = torch.linalg.svdvals(bank.dense(weight, slot).double() - W)
        # W' was rounded: what is small beside W says nothing about the update.
        floor = float(torch.linalg.matrix_norm(W, 2)) * max(weight.shape) * eps
    else:
        values = _values(bank, weight, slot)
    share = max(weight.shape) * eps if tolerance is None else tolerance
    return int((values > max(share * float(values[0]), floor)).sum())


def _values(bank: Bank, weight: Tensor, slot: int) -> Tensor:
    """Return the singular values of dW, or as many as its factors can have."""
    with bank.reading(weight):
        if bank.kind != "factors":
            return torch.linalg.svdvals(bank.delta(slot, slot + 1)[0].double())
        B, A = (factor[0].double() for factor in bank.factors(slot, slot + 1))
        return torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT)
