"""GLoRA scales and shifts both the weight and the bias.

W0 A is element-wise in the authors' code. A and B are each low-rank ("lora", A_d A_u), a factor per
output ("vector"), one number ("constant") or absent ("none"); so are C, which shifts the bias
through W0 and has no "constant", and D and E, which have no "lora". The paper searches over these
per layer (evolution on a supernet); here one choice holds for all, PEFT's by default.

:summary: Scales W entry by entry by a low-rank matrix, shifts it by another, and adapts the bias
:equation: f(x) = (W + W ∘ A + B) x + W C + D ∘ b + E + b, A = A_d A_u, B = B_d B_u, C = C_d C_u
:trap: W A is element-wise, not a matrix product.
:trap: A_d, B_d and C_d start at 0, so A_u, B_u and C_u are silent in the first step.
:trap: The paper chooses each layer's paths by an evolutionary search; this is one point.
:trap: C, D and E exist where the layer has a bias, as in PEFT; the authors' code
    makes one elsewhere.
:title: One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning
:authors: Arnav Chavan, Zhuang Liu, Deepak Gupta, Eric Xing, Zhiqiang Shen
:source: arXiv 2306.07967, 2023: section 3, the unified formulation
:verified: authors' code (Arnav0400/ViT-Slim, GLoRA/layer.py), weight and bias; equality with
    installed PEFT
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class GLoRA(Form):
    """W and the bias, each scaled and shifted; path_A to path_E say what A to E are."""

    reads: ClassVar[frozenset[str]] = frozenset({"W"})
    layers: ClassVar[frozenset[str]] = frozenset({"Linear", "Conv1D", "Conv2d"})

    path_A: Literal["lora", "vector", "constant", "none"] = "lora"
    path_B: Literal["lora", "vector", "constant", "none"] = "lora"
    path_C: Literal["lora", "vector", "none"] = "lora"
    path_D: Literal["vector", "constant", "none"] = "constant"
    path_E: Literal["vector", "constant", "none"] = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path_A == self.path_B == "none":
            raise UserError("GLoRA with both paths of the weight 'none' has nothing to train")

    def scale(self, alpha: float, rank: int) -> float:
        return 1.0

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return X_d [rows, r] = 0 and X_u [r, columns] Xavier-uniform, or X = 0, per path X."""
        m, n, r = site.d_out, site.d_in, site.rank
        sizes = {"A": (m, n), "B": (m, n)}
        if site.has_bias:
            sizes |= {"C": (n, 1), "D": (m, 1), "E": (m, 1)}
        t: Tensors = {}
        for name, (rows, columns) in sizes.items():
            path = getattr(self, f"path_{name}")
            if path == "lora":
                bound = (6 / (columns + r)) ** 0.5
                t[f"{name}_d"] = evidence.weight.new_zeros(rows, r)
                t[f"{name}_u"] = uniform(evidence, f"{name}_u", r, columns, bound=bound)
            elif path != "none":
                t[name] = evidence.weight.new_zeros(rows if path == "vector" else 1)
        return t

    def delta(self, t: Tensors, site: Site) -> Tensor:
        A, B = path(t, "A"), path(t, "B")
        if A is not None:
            return t["W"] * A if B is None else t["W"] * A + B
        assert B is not None  # or there would be nothing to train
        return B.expand(*B.shape[:-2], site.d_out, site.d_in)

    def bias(self, t: Tensors, b: Tensor, site: Site) -> Tensor:
        C, D, E = path(t, "C"), path(t, "D"), path(t, "E")
        shifts = [
            *([] if C is None else [(t["W"] @ C)[..., 0]]),
            *([] if D is None else [D[..., 0] * b]),
            *([] if E is None else [E[..., 0]]),
        ]
        return sum(shifts, b)


def path(t: Tensors, name: str) -> Tensor | None:
    """Return one of A to E as a matrix or a column, None where there is none."""
    if name in t:
        return t[name].unsqueeze(-1)
    return t[f"{name}_d"] @ t[f"{name}_u"] if f"{name}_d" in t else None


register("glora", "optimization", __doc__, GLoRA())
