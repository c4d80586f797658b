"""LoftQ, arXiv 2310.08659, algorithm 1: the adapted layer is Q + A Bᵀ, and its start minimises
‖W - Q - A Bᵀ‖ by T rounds of Q_t = q(W - A_{t-1} B_{t-1}ᵀ), A_t, B_t = SVD_r(W - Q_t) from
A_0 = B_0 = 0 (eqs. 6 to 9).

The paper's A is our B and the reverse. Q is NF4 in blocks of 64 or int8 per row; the model's own W
is left alone and does not enter: the layer computes with the codes. So step 0 is not the base but
its quantised approximation, on purpose.

:summary: A quantised base and the pair that makes up for most of its error
:equation: W' = Q + s B A, Q_t = q(W - s B A), s B A = SVD_r(W - Q_t), T rounds
:trap: Step 0 is the quantised approximation of the base, not the base.
:trap: The scale divides S; PEFT leaves it out, so its start is off unless alpha = r.
:trap: The codes belong to this pair: another pair on the same codes is another start.
:title: LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models
:authors: Yixiao Li, Yifan Yu, Chen Liang, Pengcheng He, Nikos Karampatziakis, Weizhu Chen, Tuo Zhao
:source: arXiv 2310.08659, 2023: algorithm 1, eqs. 6 to 9
:verified: paper and authors' code (yxli2123/LoftQ, utils.py)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.core.quantize import dequantize, quantize
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import check_scaling, plain_pair, scale_of
from loralab.methods.initialization.pissa import split_triplets
from loralab.recipe import Evidence, Form, Site, Start, Tensors


def alternate(
    W: Tensor, rank: int, scale: float, bits: int, n_iter: int, pair_first: bool
) -> Tensors:
    """Return codes and absmax of Q, and A, B with s B A near W - Q, after `n_iter` rounds.

    Args:
        pair_first: begin with the SVD of W and end with Q (QPiSSA) instead of the reverse (LoftQ).
    """
    pair: Tensors = {}
    rest, left = W, W  # what Q and what the pair has to stand for
    for _ in range(n_iter):
        if pair_first:
            pair, rest = _top(left, W, rank, scale)
        codes, absmax = quantize(rest, bits)
        left = W - dequantize(codes, absmax, (W.shape[0], W.shape[1]))
        if not pair_first:
            pair, rest = _top(left, W, rank, scale)
    return pair | {"codes": codes, "absmax": absmax}


def _top(left: Tensor, W: Tensor, rank: int, scale: float) -> tuple[Tensors, Tensor]:
    """Return A, B of the r leading triplets of `left`, and W without them."""
    U, S, Vh = torch.linalg.svd(left, full_matrices=False)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    return split_triplets(U, S, Vh, scale), W - (U * S) @ Vh


def check_rounds(name: str, bits: int, n_iter: int) -> None:
    """Raise UserError unless there are 4 or 8 bits and at least one round."""
    if bits not in (4, 8):
        raise UserError(f"bits of {name} are 4 (NF4) or 8 (int8), not {bits}")
    if n_iter < 1:
        raise UserError(f"{name} takes at least one round, not n_iter = {n_iter}")


@dataclass(frozen=True)
class QuantizedLoRA(Form):
    """One pair A, B beside a quantised copy of W, which stands in W's place.

    By itself it is QLoRA: NF4 codes of W, A random and B = 0.

    Args:
        scaling: as in LoRA.
    """

    pair: ClassVar[bool] = True
    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "codes", "absmax"})
    frozen: ClassVar[frozenset[str]] = frozenset({"codes", "absmax"})
    departs: ClassVar[bool] = True  # step 0 is not the base, on purpose

    scaling: str = "alpha/r"

    def __post_init__(self) -> None:
        check_scaling(self.scaling)

    def scale(self, alpha: float, rank: int) -> float:
        return scale_of(self.scaling, alpha, rank)

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        codes, absmax = quantize(evidence.weight, 4)
        return {**plain_pair(site, evidence), "codes": codes, "absmax": absmax}

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return t["B"], t["A"]

    def base(self, t: Tensors, W: Tensor, site: Site) -> Tensor:
        return dequantize(t["codes"], t["absmax"], (site.d_out, site.d_in))


@dataclass(frozen=True)
class LoftQ(Start):
    """Codes first, then the pair for what they miss.

    Args:
        bits: 4 for NF4, 8 for int8.
        n_iter: T; 5 in the authors' code, where the paper's gains level off.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"codes", "absmax"})
    seeded = False

    bits: int = 4
    n_iter: int = 5

    def __post_init__(self) -> None:
        check_rounds("LoftQ", self.bits, self.n_iter)

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        W, s = evidence.weight, evidence.scale
        return alternate(W, site.rank, s, self.bits, self.n_iter, pair_first=False)


register("loftq", "initialization", __doc__, QuantizedLoRA(), start=LoftQ())
