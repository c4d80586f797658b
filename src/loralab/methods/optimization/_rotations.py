"""Block-diagonal rotations of a layer's input, which OFT and BOFT are made of."""

import torch
from torch import Tensor


def block(theta: Tensor) -> int:
    """Return b for theta [*, b (b - 1) / 2]."""
    return round((1 + (1 + 8 * theta.shape[-1]) ** 0.5) / 2)


def skew(theta: Tensor, b: int) -> Tensor:
    """Return Q = -Qᵀ [*, b, b] with theta [*, b (b - 1) / 2] above its diagonal, row by row."""
    place = torch.zeros(b, b, dtype=torch.long, device=theta.device)
    rows, cols = torch.triu_indices(b, b, 1, device=theta.device)
    place[rows, cols] = torch.arange(len(rows), device=theta.device)
    sign = torch.ones(b, b, dtype=theta.dtype, device=theta.device)
    return theta[..., place + place.T] * (sign.triu(1) - sign.tril(-1))


def cayley(Q: Tensor, neumann: int = 0) -> Tensor:
    """Return (I + Q)(I - Q)⁻¹, or (I + Q)(I + Q + ... + Q^neumann) in its place."""
    one = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    if not neumann:
        # I - Q is regular, but not after rounding in a diverged slot; `solve` would raise for all.
        return torch.linalg.solve_ex(one - Q, one + Q).result
    series = one.expand_as(Q)
    for _ in range(neumann):
        series = one + Q @ series
    return series + Q @ series


def turn(x: Tensor, R: Tensor) -> Tensor:
    """Return Rᵀ x for rows x [*, n, in] and diagonal blocks R [*, in / b, b, b]."""
    parts = x.unflatten(-1, (-1, R.shape[-1])).transpose(-3, -2)
    return (parts @ R.to(x.dtype)).transpose(-3, -2).flatten(-2)
