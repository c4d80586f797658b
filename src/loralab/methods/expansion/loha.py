"""LoHa (FedPara): the element-wise product of two low-rank products has a rank up to r².

It has exact factors of inner size r²: column (p, q) of B is B1_p ∘ B2_q, row (p, q) of A is
A1_p ∘ A2_q. While r² is small they cost less than a dense dW, and nothing W-sized is made.

:summary: The element-wise product of two low-rank products: rank up to r² at twice LoRA's count
:equation: dW = s (B1 A1) ∘ (B2 A2)
:trap: With B1 = B2 = 0 the gradient is zero for ever; exactly one factor may start at 0.
:trap: (B1 A1 x) ∘ (B2 A2 x) is not (B1 A1 ∘ B2 A2) x.
:title: FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning
:authors: Nam Hyeon-Woo, Moon Ye-Bin, Tae-Hyun Oh
:source: arXiv 2108.06098, 2021: section 2.2, proposition 1
:verified: paper, survey 2601.22708 and equality with installed PEFT; PEFT zeroes A2, we B2
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class LoHa(Form):
    """The element-wise product of two low-rank products."""

    dense: ClassVar[bool] = True  # only where r² factors would cost more: see `branch`

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return B1, B2 [out, r] and A1, A2 [r, in].

        Only B2 is zero: with both B at zero every gradient is zero for ever. Kaiming-uniform for
        the others, as the paper's He initialisation is read by PEFT.
        """
        r, m, n = site.rank, site.d_out, site.d_in
        return {
            "B1": uniform(evidence, "B1", m, r, bound=r**-0.5),
            "A1": uniform(evidence, "A1", r, n, bound=n**-0.5),
            "B2": evidence.weight.new_zeros(m, r),
            "A2": uniform(evidence, "A2", r, n, bound=n**-0.5),
        }

    def delta(self, t: Tensors, site: Site) -> Tensor:
        return (t["B1"] @ t["A1"]) * (t["B2"] @ t["A2"])

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        if site.rank**2 * (site.d_in + site.d_out) >= site.d_in * site.d_out:
            return x @ self.delta(t, site).mT
        B = (t["B1"].unsqueeze(-1) * t["B2"].unsqueeze(-2)).flatten(-2)
        A = (t["A1"].unsqueeze(-2) * t["A2"].unsqueeze(-3)).flatten(-3, -2)
        return (x @ A.mT) @ B.mT


register("loha", "expansion", __doc__, LoHa())
