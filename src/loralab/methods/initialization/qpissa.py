"""QPiSSA, arXiv 2404.02948, section 4 and algorithm 1: W ≈ nf4(W_res) + A B, A B = SVD_r(W) and
W_res = W - A B at first; then T - 1 rounds of A B = SVD_r(W - nf4(W_res)), W_res = W - A B.

The paper's A is our B and the reverse. LoftQ in the other order: the pair takes the principal part
and the codes stand for what is left, whose narrower spread quantises better. In algorithm 1 the new
W_res carries the index t - 1; the authors' code takes the pair just found, as here.

:summary: Trains the principal triplets beside a quantised residual
:equation: W' = nf4(W - s B0 A0) + s B A, s B0 A0 = SVD_r(W - nf4(...)), T rounds
:trap: Step 0 is the quantised approximation of the base, not the base.
:trap: Quantising W itself and adding PiSSA's pair would count the principal part twice.
:trap: After the first round the pair is the SVD of W - nf4(W_res), not of W.
:title: PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models
:authors: Fanxu Meng, Zhaohui Wang, Muhan Zhang
:source: arXiv 2404.02948, 2024: section 4, eq. 12, algorithm 1
:verified: paper and authors' code (GraphPKU/PiSSA, utils/init_qpissa.py); the residual equals
    installed PEFT's
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
class QPiSSA(Alternation):
    """The leading triplets first, then codes for the rest.

    Args:
        bits: 4 for NF4, 8 for int8.
        n_iter: T; 5 in the authors' recommended run, 1 is section 4's plain form.
    """

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        W = left = evidence.weight
        for _ in range(self.n_iter):
            pair, product = leading_pair(left, site.rank, evidence.scale)
            codes, Q = quantized(W - product, self.bits)
            left = W - Q
        return pair | codes


register("qpissa", "initialization", __doc__, QuantizedLoRA(), start=QPiSSA())
