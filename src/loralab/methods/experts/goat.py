"""GOAT: y = W_res x + s Σ_{i ∈ top-k} ω_i(x) B_i A_i x, expert i from slice i of W = U S Vᵀ.

Slice i begins at singular value i min(m, n) / E. W_res = W0 - (s / E) Σ B_i A_i makes step 0 the
base for a uniform router only; with residual="exact" the first router's mixture is taken off.

:summary: LoRA experts that start from disjoint slices of the weight's singular values
:equation: B_i = U_i sqrt(S_i / (s rho)), A_i = sqrt(S_i / (s rho)) V_i^T, s = sqrt(3 eta n / d)
:trap: The rank is that of all experts together, as in the paper.
:trap: alpha / r multiplies the derived scale; LoRAFactory's own ceil(alpha / d) / d is not offered.
:title: Make LoRA Great Again: Boosting LoRA with Adaptive Singular Values and Mixture-of-Experts
    Optimization Alignment
:authors: Chenghao Fan, Zhenyi Lu, Sichen Liu, Chengfeng Gu, Xiaoye Qu, Wei Wei, Yu Cheng
:source: arXiv 2502.16894, 2025: section 3, eqs. 10 to 19, theorem 3.5 (which writes r for d)
:verified: paper (G.5's settings too), authors' code (Facico/GOAT-PEFT, peta/src/goat/layer.py)
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loralab.bounds import NonNegative, Positive
from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.methods.experts._experts import TopK
from loralab.methods.initialization._svd import split_triplets
from loralab.recipe import Evidence, Site, Tensors


@dataclass(frozen=True)
class GOAT(TopK):
    """Experts from disjoint slices of the singular value decomposition.

    Args:
        n_experts: E; each has rank d = r / E, or 1 where r is less than E.
        eta: η, the learning rate of full fine-tuning over that of LoRA.
        rho: ρ, by which the slices start smaller than they are in W.
        residual: the paper's "mean", or "exact", with which step 0 is the base.
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"A0", "B0", "W_g0"})
    balance: NonNegative = 0.001
    eta: Positive = 1.0
    rho: Positive = 10.0
    residual: Literal["mean", "exact"] = "mean"

    @property
    def departs(self) -> bool:
        return self.residual == "mean"

    def width(self, site: Site) -> int:
        """Return d, each expert's rank."""
        return max(1, site.rank // self.n_experts)

    def derived(self, site: Site) -> float:
        """Return √(3 η n / d) for n inputs."""
        return (3 * self.eta * site.d_in / self.width(site)) ** 0.5

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [E d, in] and B [out, E d] from W, W_g [E, in], and their frozen copies."""
        U, S, Vh = torch.linalg.svd(evidence.weight, full_matrices=False)
        d, side = self.width(site), len(S)
        starts = [min(i * side // self.n_experts, max(side - d, 0)) for i in range(self.n_experts)]
        at = torch.tensor([i for first in starts for i in range(first, min(first + d, side))])
        scale = evidence.scale * self.derived(site) * self.rho
        t = split_triplets(U[:, at], S[at], Vh[at], scale)
        t["W_g"] = uniform(evidence, "W_g", self.n_experts, site.d_in, bound=site.d_in**-0.5)
        kept = ("A", "B") if self.residual == "mean" else ("A", "B", "W_g")
        return t | {f"{name}0": t[name].clone() for name in kept}

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        if self.residual == "mean":
            first = (x @ t["A0"].mT) @ t["B0"].mT / self.n_experts
        else:
            first = super().branch({name: t[f"{name}0"] for name in ("A", "B", "W_g")}, x, site)
        return self.derived(site) * (super().branch(t, x, site) - first)


register("goat", "experts", __doc__, GOAT())
