"""LoftQ, arXiv 2310.08659, algorithm 1: the adapted layer is Q + A Bᵀ, and its start minimises
‖W - Q - A Bᵀ‖ by T rounds of Q_t = q(W - A_{t-1} B_{t-1}ᵀ), A_t, B_t = SVD_r(W - Q_t) from
A_0 = B_0 = 0 (eqs. 6 to 9).

The paper's A is our B and the reverse. Q is NF4 in blocks of 64 or int8 per row; the model's own W
is left alone and does not enter: the layer computes with the codes.

:summary: A quantised base and the pair that makes up for most of its error
:equation: W' = Q + s B A, Q_t = q(W - s B A), s B A = SVD_r(W - Q_t), T rounds
:trap: Step 0 is the quantised approximation of the base, not the base, on purpose.
:trap: The scale divides S; PEFT leaves it out, so its start is off unless alpha = r.
:trap: The codes belong to this pair: another pair on the same codes is another start.
:title: LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models
:authors: Yixiao Li, Yifan Yu, Chen Liang, Pengcheng He, Nikos Karampatziakis, Weizhu Chen, Tuo Zhao
:source: arXiv 2310.08659, 2023: algorithm 1, eqs. 6 to 9
:verified: paper and authors' code (yxli2123/LoftQ, utils.py)
"""

from dataclasses import dataclass

from loralab.methods import register
from loralab.methods.initialization._quantized import (
    Alternation,
    QuantizedLoRA,
    leading_pair,
    quantized,
)
from loralab.recipe import Evidence, Site, Tensors


@dataclass(frozen=True)
class LoftQ(Alternation):
    """Codes first, then the pair for what they miss.

    Args:
        bits: 4 for NF4, 8 for int8.
        n_iter: T; 5 in the authors' code, where the paper's gains level off.
    """

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        W = rest = evidence.weight
        for _ in range(self.n_iter):
            codes, Q = quantized(rest, self.bits)
            pair, product = leading_pair(W - Q, site.rank, evidence.scale)
            rest = W - product
        return pair | codes


register("loftq", "initialization", __doc__, QuantizedLoRA(), start=LoftQ())
