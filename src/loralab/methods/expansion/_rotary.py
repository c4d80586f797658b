"""Rotary position embedding (Su et al., arXiv 2104.09864), with which MoRA tells pieces of x apart.

Piece i turns the plane of its entries j and j + r̂/2 by the angle i θ_j, θ_j = 10000^(-2j/r̂).
"""

import torch
from torch import Tensor


def rotated(pieces: Tensor) -> Tensor:
    """Return pieces [..., n, r̂], the entries of piece i turned by i θ_j; r̂ is even."""
    n, half = pieces.shape[-2], pieces.shape[-1] // 2
    position = torch.arange(n, dtype=torch.float64, device=pieces.device)
    angle = position[:, None] * 10000 ** (-torch.arange(half, device=pieces.device) / half)
    cos, sin = angle.cos().to(pieces), angle.sin().to(pieces)
    a, b = pieces[..., :half], pieces[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
