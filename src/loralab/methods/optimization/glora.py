"""GLoRA: scales and shifts both the weight and the bias by five support tensors A to E.

A and B are each low-rank ("lora", A_d A_u), a factor per output ("vector"), one number ("constant")
or absent ("none"); so are C, which has no "constant", and D and E, which have no "lora". The paper
searches over these per layer (evolution on a supernet); here one choice holds for all, PEFT's by
default.

:summary: Scales W entry by entry by a low-rank matrix, shifts it by another, and adapts the bias
:equation: f(x) = (W + W ∘ A + B) x + W C + D ∘ b + E + b, A = A_d A_u, B = B_d B_u, C = C_d C_u
:trap: W A is element-wise in the authors' code, not a matrix product.
:trap: A_d, B_d and C_d start at 0, so A_u, B_u and C_u are silent in the first step.
:trap: C, D and E exist where the layer has a bias, as in PEFT; the authors' code makes one
    elsewhere.
:title: One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning
:authors: Arnav Chavan, Zhuang Liu, Deepak Gupta, Eric Xing, Zhiqiang Shen
:source: arXiv 2306.07967, 2023: section 3, the unified formulation
:verified: authors' code (Arnav0400/ViT-Slim, GLoRA/layer.py), weight and bias; equality with
    installed PEFT; the paper's text was not to be had
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.optimization._support import support, supported
from loralab.methods.optimization._unscaled import Unscaled
from loralab.recipe import Evidence, Site, Tensors


@dataclass(frozen=True)
class GLoRA(Unscaled):
    """W and the bias, each scaled and shifted; path_A to path_E say what A to E are."""

    reads: ClassVar[frozenset[str]] = frozenset({"W"})

    path_A: Literal["lora", "vector", "constant", "none"] = "lora"
    path_B: Literal["lora", "vector", "constant", "none"] = "lora"
    path_C: Literal["lora", "vector", "none"] = "lora"
    path_D: Literal["vector", "constant", "none"] = "constant"
    path_E: Literal["vector", "constant", "none"] = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path_A == self.path_B == "none":
            raise UserError("GLoRA with both paths of the weight 'none' has nothing to train")

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return the tensors of A to E, with which all of them are 0."""
        m, n = site.d_out, site.d_in
        sizes = {"A": (m, n), "B": (m, n)}
        if site.has_bias:
            sizes |= {"C": (n, 1), "D": (m, 1), "E": (m, 1)}
        t: Tensors = {}
        for name, (rows, columns) in sizes.items():
            path = getattr(self, f"path_{name}")
            t |= support(evidence, name, path, rows, columns, site.rank)
        return t

    def delta(self, t: Tensors, site: Site) -> Tensor:
        A, B = supported(t, "A"), supported(t, "B")
        if A is not None:
            return t["W"] * A if B is None else t["W"] * A + B
        assert B is not None  # or there would be nothing to train
        return B.expand(*B.shape[:-2], site.d_out, site.d_in)

    def bias(self, t: Tensors, b: Tensor, site: Site) -> Tensor:
        C, D, E = (supported(t, name) for name in "CDE")
        shifted = b
        if C is not None:
            shifted = shifted + (t["W"] @ C)[..., 0]
        if D is not None:
            shifted = shifted + D[..., 0] * b
        return shifted if E is None else shifted + E[..., 0]


register("glora", "optimization", __doc__, GLoRA())
