"""BSLoRA's T: three ways to fit a shared pair B [h, r], A [r, w] to a layer [m, n].

    slice  the middle m rows of B and n columns of A, of a pair made for the largest layer
    gate   g_ou (g_od B) and (A g_iu) g_id, of a square pair of side S, with vectors g of the layer
    kron   K_B ⊗ B and K_A ⊗ A, cut to m rows and n columns, of a square pair of side S

The authors' code (yuhua-zhou/BSLoRA, peft/tuners/share_lora/layer.py), with its sides S.
"""

from torch import Tensor

from loralab.recipe import Tensors

SIDES = {"slice": 0, "gate": 1024, "kron": 256}  # S; a sliced pair has the largest layer's sides


def shapes(how: str, m: int, n: int, r: int, size: int | None) -> dict[str, tuple[int, int]]:
    """Return the shapes of a pair of rank r, and between A and B those of the layer's own part.

    Args:
        size: S; None for the authors'.
    """
    if how == "slice":
        return {"A": (r, n), "B": (m, r)}
    S = size or SIDES[how]
    own = {"K_A": (1, -(-n // S)), "K_B": (-(-m // S), 1)}
    if how == "gate":
        own = {"g_id": (1, n), "g_iu": (S, 1), "g_od": (1, S), "g_ou": (m, 1)}
    return {"A": (r, S), **own, "B": (S, r)}


def fitted(how: str, t: Tensors, m: int, n: int) -> tuple[Tensor, Tensor]:
    """Return the factors [*, m, k] and [*, k, n] of T(B A), from A, B and the layer's own part."""
    A, B = t["A"], t["B"]
    if how == "gate":
        return t["g_ou"] @ (t["g_od"] @ B), (A @ t["g_iu"]) @ t["g_id"]
    if how == "kron":
        high = t["K_B"].unsqueeze(-1) * B.unsqueeze(-3)  # [*, m / S, S, r]
        wide = t["K_A"].unsqueeze(-1) * A.unsqueeze(-2)  # [*, r, n / S, S]
        return high.flatten(-3, -2)[..., :m, :], wide.flatten(-2)[..., :n]
    top, left = (B.shape[-2] - m) // 2, (A.shape[-1] - n) // 2
    return B[..., top : top + m, :], A[..., left : left + n]
