"""RidgeLoRA: a trained diagonal and a pair before W [in, out], x_out = x (λ Σ + (α/r) A B) W.

Algorithm 1: λ = 1, Σ = diag(N, 1, ..., 1) with N = σ(N(μ, σ²)) [r], A ~ N(0, 1/r) [in, r] and
B = (r/α) A⁺ (I - λ Σ), which is to make λ Σ + (α/r) A B = I. But A A⁺ is a projection, so with a
random A it does not: we measure the update from the start. The paper's A is our Aᵀ, its B our Bᵀ.

:summary: A trained diagonal plus a low-rank pair in series before the frozen weight
:equation: W' = W (I + (l S - S0) + s (B A - B0 A0)), S diagonal, in front of W
:trap: It is in series: the pair is [in, in], and W' = W M can have full rank beside W.
:trap: LoRAFactory draws A from N(0, 1), the paper from N(0, 1/r).
:title: RidgeLoRA: Matrix Ridge Enhanced Low-Rank Adaptation of Large Language Models
:authors: Junda Zhu, Jun Ai, Yujun Li, Yichun Yin, Yasheng Wang, Lifeng Shang, Qun Liu
:source: NeurIPS 2025, 2025: eqs. 1, 4 and 5, algorithm 1
:verified: the paper's equations and algorithm; LoRAFactory's ridgelora.py for mu and sigma
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import Finite, NonNegative
from loralab.methods import register
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class RidgeLoRA(Form):
    """A trained diagonal and a pair of the layer's input size, before the base layer.

    Args:
        mu, sigma: of the draw behind N; 2 and 1 in LoRAFactory, the paper names no numbers.
        beta: weight of each layer's nuclear norm ‖λ Σ + (α/r) A B - I‖_* (eq. 4); -0.5 over the
            mean of all layers in the paper, to raise the rank; 0, off, here and in LoRAFactory,
            for it takes an SVD of [in, in] per layer and step.
    """

    # What the update is measured from, and s, which `inner` does not get.
    frozen: ClassVar[frozenset[str]] = frozenset({"A0", "B0", "ridge0", "s"})
    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "ridge", "lam"})
    layers: ClassVar[frozenset[str]] = frozenset({"Linear", "Conv1D", "Conv2d"})

    mu: Finite = 2.0
    sigma: NonNegative = 1.0
    beta: Finite = 0.0

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [r, in], B [in, r], the ridge Σ [in], λ [1], their copies, and s [1]."""
        W, r, n = evidence.weight, site.rank, site.d_in

        def normal(name: str, *shape: int) -> Tensor:
            return torch.randn(*shape, generator=evidence.generator(name), dtype=torch.float64)

        A = normal("A", r, n) * r**-0.5
        ridge = torch.ones(n, dtype=torch.float64)
        ridge[: min(r, n)] = (self.mu + self.sigma * normal("ridge", r)[:n]).sigmoid()
        B = (1 - ridge)[:, None] * torch.linalg.pinv(A) / evidence.scale
        t = {"A": A.to(W), "B": B.to(W), "ridge": ridge.to(W)}
        copies = {name + "0": x.clone() for name, x in t.items()}
        return t | copies | {"lam": W.new_ones(1), "s": W.new_full((1,), evidence.scale)}

    def inner(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        # B A - B0 A0 = (B - B0) A + B0 (A - A0), which is exactly 0 at the start. Differences are
        # taken before rounding to x's precision.
        ridge = (t["lam"] * t["ridge"] - t["ridge0"]).unsqueeze(-2).to(x)
        A, dA = t["A"].to(x), (t["A"] - t["A0"]).to(x)
        s = t["s"].unsqueeze(-1)
        B0, dB = (s * t["B0"]).to(x), (s * (t["B"] - t["B0"])).to(x)
        return x + (ridge * x + (x @ A.mT) @ dB.mT + (x @ dA.mT) @ B0.mT)

    def penalty(self, t: Tensors, site: Site) -> Tensor | None:
        if not self.beta:
            return t["lam"].new_zeros(t["lam"].shape[:-1])
        M = torch.diag_embed(t["lam"] * t["ridge"] - 1) + t["s"].unsqueeze(-1) * (t["B"] @ t["A"])
        # A diverged slot would make svdvals raise for all of them.
        return self.beta * torch.linalg.svdvals(M.nan_to_num(0.0, 0.0, 0.0)).sum(-1)


register("ridgelora", "initialization", __doc__, RidgeLoRA())
