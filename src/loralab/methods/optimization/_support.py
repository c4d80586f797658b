"""GLoRA's support tensors X: X_d X_u, a factor per row, one number, or nothing.

Section 3 of arXiv 2306.07967; the start is that of the authors' code.
"""

from torch import Tensor

from loralab.methods.expansion.lora import uniform
from loralab.recipe import Evidence, Tensors


def support(
    evidence: Evidence, name: str, path: str, rows: int, columns: int, rank: int
) -> Tensors:
    """Return X_d [rows, r] = 0 and X_u [r, columns] Xavier-uniform, or X = 0, or no tensor.

    Args:
        path: "lora", "vector", "constant" or "none".
    """
    zeros = evidence.weight.new_zeros
    if path == "none":
        return {}
    if path != "lora":
        return {name: zeros(rows if path == "vector" else 1)}
    bound = (6 / (columns + rank)) ** 0.5
    up = uniform(evidence, f"{name}_u", rank, columns, bound=bound)
    return {f"{name}_d": zeros(rows, rank), f"{name}_u": up}


def supported(t: Tensors, name: str) -> Tensor | None:
    """Return X as a matrix or a column, None where there is none."""
    if name in t:
        return t[name].unsqueeze(-1)
    return t[f"{name}_d"] @ t[f"{name}_u"] if f"{name}_d" in t else None
