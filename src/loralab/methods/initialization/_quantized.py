"""What LoftQ and QPiSSA share: a pair beside a quantised copy of W, and the halves of a round."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from loralab.bounds import Count
from loralab.core.quantize import dequantize, quantize
from loralab.methods.expansion.lora import Pair, plain_pair
from loralab.methods.initialization._svd import leading_triplets, split_triplets
from loralab.recipe import Evidence, Site, Start, Tensors


@dataclass(frozen=True)
class QuantizedLoRA(Pair):
    """One pair A, B beside a quantised copy of W, which stands in W's place.

    By itself it is QLoRA: NF4 codes of W, A random and B = 0.

    Args:
        scaling: as in LoRA.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "codes", "absmax"})
    frozen: ClassVar[frozenset[str]] = frozenset({"codes", "absmax"})

    @property
    def departs(self) -> bool:
        return True

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        return plain_pair(site, evidence) | quantized(evidence.weight, 4)[0]

    def base(self, t: Tensors, W: Tensor, site: Site) -> Tensor:
        return dequantize(t["codes"], t["absmax"], (site.d_out, site.d_in))


@dataclass(frozen=True)
class Alternation(Start):
    """Base of starts that find the codes and the pair in turns.

    Args:
        bits: 4 for NF4, 8 for int8.
        n_iter: T, the number of rounds.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"codes", "absmax"})
    seeded = False

    bits: Literal[4, 8] = 4
    n_iter: Count = 5


def quantized(X: Tensor, bits: int) -> tuple[Tensors, Tensor]:
    """Return the codes and absmax of X, and q(X)."""
    codes, absmax = quantize(X, bits)
    return {"codes": codes, "absmax": absmax}, dequantize(codes, absmax, (X.shape[0], X.shape[1]))


def leading_pair(X: Tensor, rank: int, scale: float) -> tuple[Tensors, Tensor]:
    """Return A, B, and s B A = SVD_r(X)."""
    U, S, Vh = leading_triplets(X, rank)
    return split_triplets(U, S, Vh, scale), (U * S) @ Vh
