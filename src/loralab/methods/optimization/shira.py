"""SHiRA: W_new = W + S, where S is trained only where a fixed mask M is 1.

:summary: Trains a fixed sparse choice of W's own entries
:equation: dW = M ∘ S with r (in + out) entries of M at 1, S0 = 0
:trap: The rank only counts entries, as many as LoRA's, as in the authors' PEFT code; the paper says
    1 to 2 % of W. dW has high rank.
:trap: s = 1 whatever alpha is (lemma 4.3).
:trap: The mask is chosen once, at the start, and never moves.
:title: Sparse High Rank Adapters
:authors: Kartikeya Bhardwaj, Nilesh Prasad Pandey, Sweta Priyadarshi, Viswanath Ganapathy, Shreya
    Kadambi, Rafael Esteves, Shubhankar Borse, Paul Whatmough, Risheek Garrepalli, Mart Van Baalen,
    Harris Teague, Markus Nagel
:source: arXiv 2406.13175, 2024: section 3.1, appendix B
:verified: paper; equality with installed PEFT
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from loralab.bounds import OneOf
from loralab.methods import register
from loralab.methods.expansion._sparse import rows_and_diagonal, spread
from loralab.methods.optimization._unscaled import Unscaled
from loralab.recipe import Evidence, Site, Tensors

MASKS = ("rand", "wm", "grad", "snip", "struct")  # section 3.1 and appendix B


@dataclass(frozen=True)
class SHiRA(Unscaled):
    """Some entries of W, chosen once.

    Args:
        mask: "rand" at random, "wm" the largest |W|, "grad" the largest |∇W|, "snip" the largest
            |W ∘ ∇W|, "struct" every f-th row and the diagonal. The paper prefers none; "rand" needs
            no data and is PEFT's.
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"index"})

    mask: Annotated[str, OneOf(MASKS)] = "rand"

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"gradient"}) if self.mask in ("grad", "snip") else frozenset()

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return `index`, places in W read row by row, and `values` = 0 of the same length."""
        count = min(site.rank * (site.d_in + site.d_out), site.d_in * site.d_out)
        if self.mask == "struct":
            index = rows_and_diagonal(site.d_out, site.d_in, count)
        else:
            order = self._score(evidence).flatten().argsort(descending=True, stable=True)
            index = order[:count].sort().values
        return {"index": index.cpu(), "values": evidence.weight.new_zeros(len(index))}

    def _score(self, evidence: Evidence) -> Tensor:
        W, G = evidence.weight, evidence.gradient
        if self.mask == "rand":
            return torch.rand(W.shape, generator=evidence.generator("mask"), dtype=torch.float64)
        if self.mask == "wm":
            return W.abs()
        assert G is not None
        return G.abs() if self.mask == "grad" else (W * G).abs()

    def delta(self, t: Tensors, site: Site) -> Tensor:
        return spread(t["values"], t["index"].long(), site)


register("shira", "optimization", __doc__, SHiRA())
