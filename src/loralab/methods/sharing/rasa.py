"""RaSA: each of a kind's L layers gives k of its r ranks to a pool of L k ranks, which all of them
use, each with its own weights D_i. So a layer has r - k + L k ranks at LoRA's parameter count.

:summary: Layers of a kind pool some of their ranks; every layer weights the whole pool
:equation: dW_i = s [B_i B_S] diag(D_i) [A_i; A_S], rank r - k + L k
:trap: The pool grows with the number of layers, and so does the cost of the forward pass.
:trap: Layers of different kinds never share, even where their shapes agree.
:trap: With one adapted layer of a kind the pool is that layer's own and RaSA is LoRA with weighted
    ranks.
:title: RaSA: Rank-Sharing Low-Rank Adaptation
:authors: Zhiwei He, Zhaopeng Tu, Xing Wang, Xingyu Chen, Zhijie Wang, Jiahao Xu, Tian Liang,
    Wenxiang Jiao, Zhuosheng Zhang, Rui Wang
:source: arXiv 2503.12576, 2025: eqs. 5 and 6, section 2
:verified: paper (sections 2 and 3.2), authors' scripts (zwhe99/RaSA) for k and alpha
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loralab.bounds import Count
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class RaSA(Form):
    """A pair of the layer's own beside a weighted pool.

    Args:
        k: ranks that each layer gives to the pool; None is r / 8, at least 1 (1, 2 and 4 at the
            authors' ranks 8, 16 and 32).
        weights: how D starts: "balanced" gives half of r to the own ranks and half to the pool, so
            that s D is α/2 over either count (eq. 6); "ones" is the survey's formula.
    """

    shared: ClassVar[Mapping[str, str]] = {"A_pool": "kind", "B_pool": "kind"}
    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "D", "A_pool", "B_pool"})

    k: Count | None = None
    weights: Literal["balanced", "ones"] = "balanced"

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [r - k, in], B = 0, A_pool [L k, in], B_pool = 0 and D [r - k + L k]."""
        r, m, n = site.rank, site.d_out, site.d_in
        k = self.k or max(1, r // 8)
        if k >= r:
            raise UserError(f"RaSA gives k of the r ranks to the pool, so r exceeds k = {k}")
        own, pool = r - k, site.n_layers * k
        zeros, ones = evidence.weight.new_zeros, evidence.weight.new_ones
        start = (r / 2 / own, r / 2 / pool) if self.weights == "balanced" else (1.0, 1.0)
        return {
            "A": uniform(evidence, "A", own, n, bound=n**-0.5),
            "B": zeros(m, own),
            "A_pool": uniform(evidence, "A_pool", pool, n, bound=n**-0.5),
            "B_pool": zeros(m, pool),
            "D": torch.cat([ones(own) * start[0], ones(pool) * start[1]]),
        }

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        pool = t["D"].shape[-1] - t["A"].shape[-2]
        B_S, A_S = t["B_pool"][..., : site.d_out, :pool], t["A_pool"][..., :pool, : site.d_in]
        A = torch.cat([t["A"], A_S], -2)
        return torch.cat([t["B"], B_S], -1), t["D"].unsqueeze(-1) * A


register("rasa", "sharing", __doc__, RaSA())
