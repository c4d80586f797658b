"""LoKr: dW = γ [C ⊗ (B A)], γ = α / r; KronA is arXiv 2212.10650.

C [u_p, u_q], B [v_p, r], A [r, v_q] for p = u_p v_p outputs, q = u_q v_q inputs. B A is optional
in the paper; as in the authors' code it is a full D [v_p, v_q] from r >= max(v_p, v_q) / 2 on.

:summary: A Kronecker product of a small and a low-rank block: high rank, few parameters
:equation: dW = s C kron (B A), C [u_p, u_q], u_p the largest divisor of p up to sqrt(p)
:trap: C kron (B A) is not (B A) kron C: the low-rank block is the larger one in the paper.
:trap: A size with no divisor near its square root (a prime) leaves C with one row.
:trap: The rank is that of one block; from half the block's size on it has no effect.
:title: Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation
:authors: Shih-Ying Yeh, Yu-Guan Hsieh, Zhidong Gao, Bernard B W Yang, Giyeong Oh, Yanmin Gong
:source: arXiv 2309.14859, 2023: eqs. 4 and 5, section 3.2
:verified: paper, authors' code (KohakuBlueleaf/LyCORIS lokr.py) and equality with installed PEFT
"""

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loralab.bounds import Count
from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.recipe import LAYERS, Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class LoKr(Form):
    """A Kronecker product of two blocks, one of them of low rank.

    Args:
        factor: f, most rows and columns of the smaller block (32 in the survey); None for √p, √q.
        low_rank: "large" as in the paper; "small" is γ [(B A) ⊗ C] (survey arXiv 2601.22708).
    """

    layers: ClassVar[frozenset[str]] = LAYERS - {"Embedding"}

    factor: Count | None = None
    low_rank: Literal["large", "small"] = "large"

    def split(self, size: int) -> tuple[int, int]:
        """Return (u, v) with u v = size and u the largest divisor up to min(f, √size)."""
        most = min(self.factor or size, isqrt(size))
        u = max(u for u in range(1, most + 1) if size % u == 0)
        return u, size // u

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return C and A, B or D. As in the authors' code A or D is 0; PEFT's default zeroes C."""
        (u_p, v_p), (u_q, v_q), r = self.split(site.d_out), self.split(site.d_in), site.rank
        C, BA = (u_p, u_q), (v_p, v_q)
        if self.low_rank == "small":
            C, BA = BA, C
        t = {"C": uniform(evidence, "C", *C, bound=C[1] ** -0.5)}
        if r >= max(BA) / 2:
            return t | {"D": evidence.weight.new_zeros(BA)}
        B = uniform(evidence, "B", BA[0], r, bound=r**-0.5)
        return t | {"A": evidence.weight.new_zeros(r, BA[1]), "B": B}

    def delta(self, t: Tensors, site: Site) -> Tensor:
        left, right = t["C"], t["D"] if "D" in t else t["B"] @ t["A"]
        if self.low_rank == "small":
            left, right = right, left
        return torch.einsum("...ac,...bd->...abcd", left, right).flatten(-2).flatten(-3, -2)

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        # (P ⊗ Q) x = P X Qᵀ with x cut into the rows of X: no product with W's size appears.
        X = x.unflatten(-1, self.split(site.d_in))
        if self.low_rank == "small":
            X = X.mT
        one = {n: v.unsqueeze(-3) for n, v in t.items()}
        h = one["C"] @ (X @ one["D" if "D" in t else "A"].mT)
        if "B" in t:
            h = h @ one["B"].mT
        return (h.mT if self.low_rank == "small" else h).flatten(-2)


register("lokr", "expansion", __doc__, LoKr())
