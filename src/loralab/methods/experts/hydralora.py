"""HydraLoRA, arXiv 2404.19245, eqs. 2 to 4: y = W0 x + s Σ_i ω_i(x) B_i A x, ω = softmax(W_g x).

One A is for what the data have in common, N heads B_i are for what differs.

:summary: One A and several B, mixed for every token by a trained router
:equation: y = W x + s sum_i omega_i B_i A x, omega = softmax(W_g x)
:trap: The weights depend on the token, so there is no dW and it cannot be merged.
:trap: The router is trained from its second step on: while all B_i are 0 it has no gradient.
:trap: With input dropout the router reads the dropped input; the authors' code reads the full one.
:title: HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning
:authors: Chunlin Tian, Zhan Shi, Zhijiang Guo, Li Li, Chengzhong Xu
:source: arXiv 2404.19245, 2024: eqs. 2 to 4
:verified: paper, where eq. 4's W_g is [r, N] but reads x, and authors' code (Clin0212/HydraLoRA)
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.bounds import Count
from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.methods.experts._experts import ROUTED_LAYERS
from loralab.methods.experts._routing import router
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class HydraLoRA(Form):
    """A shared A, N heads B_i and a trained router.

    Args:
        n_heads: N; the paper finds 3 by clustering its data.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "W_g"})
    layers: ClassVar[frozenset[str]] = ROUTED_LAYERS

    n_heads: Count = 3

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [r, in], B [N, out, r] = 0 and the router W_g [N, in]."""
        n = site.d_in
        return {
            "A": uniform(evidence, "A", site.rank, n, bound=n**-0.5),
            "B": evidence.weight.new_zeros(self.n_heads, site.d_out, site.rank),
            "W_g": uniform(evidence, "W_g", self.n_heads, n, bound=n**-0.5),
        }

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        omega, h = router(t, x).to(x.dtype), x @ t["A"].mT
        # Σ_i ω_i B_i h as one product: ω ⊗ h [*, n, N r] against all heads side by side.
        mixed = (omega.unsqueeze(-1) * h.unsqueeze(-2)).flatten(-2)
        return mixed @ t["B"].mT.flatten(-3, -2)


register("hydralora", "experts", __doc__, HydraLoRA())
