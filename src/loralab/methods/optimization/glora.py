"""GLoRA, arXiv 2306.07967, section 3: f(x) = (W0 + W0 A + B) x + C W0 + D b0 + E + b0.

W0 A is element-wise in the authors' code, and A and B are each low-rank ("lora", A_d A_u), a factor
per output ("vector"), one number ("constant") or absent ("none"). The paper searches over these per
layer (evolution on a supernet); here one choice holds for all. The bias paths C, D, E are not
built: an adapter here leaves biases as they are.

:summary: Scales W entry by entry by a low-rank matrix, and shifts it by another
:equation: dW = W ∘ (A_d A_u) + B_d B_u
:trap: W A is element-wise, not a matrix product.
:trap: Both A_d and B_d start at 0, so both A_u and B_u are silent in the first step.
:trap: The paper chooses each layer's paths by an evolutionary search; this is one point.
:title: One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning
:authors: Arnav Chavan, Zhuang Liu, Deepak Gupta, Eric Xing, Zhiqiang Shen
:source: arXiv 2306.07967, 2023: section 3, the unified formulation, its weight part
:verified: authors' code (Arnav0400/ViT-Slim, GLoRA/layer.py); equality with installed PEFT with
    config_C and config_D_E 'none'
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.errors import UserError, near_misses
from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.recipe import Evidence, Form, Site, Tensors

PATHS = ("lora", "vector", "constant", "none")


@dataclass(frozen=True)
class GLoRA(Form):
    """W scaled entry by entry, and shifted.

    Args:
        path_A: what A is: "lora", "vector", "constant" or "none".
        path_B: what B is, likewise.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"W"})
    layers: ClassVar[frozenset[str]] = frozenset({"Linear", "Conv1D", "Conv2d"})

    path_A: str = "lora"
    path_B: str = "lora"

    def __post_init__(self) -> None:
        for field in ("path_A", "path_B"):
            path = getattr(self, field)
            if path not in PATHS:
                hint = near_misses(path, PATHS) or f"; one of {', '.join(PATHS)}"
                raise UserError(f"unknown {field} {path!r} of GLoRA{hint}")
        if self.path_A == self.path_B == "none":
            raise UserError("GLoRA with both paths 'none' has nothing to train")

    def scale(self, alpha: float, rank: int) -> float:
        return 1.0

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A_d, B_d [out, r] = 0 and A_u, B_u [r, in] Xavier-uniform; or A, B = 0."""
        zeros, r = evidence.weight.new_zeros, site.rank
        t: Tensors = {}
        for name, path in (("A", self.path_A), ("B", self.path_B)):
            if path == "lora":
                bound = (6 / (site.d_in + r)) ** 0.5
                t[f"{name}_d"] = zeros(site.d_out, r)
                t[f"{name}_u"] = uniform(evidence, f"{name}_u", r, site.d_in, bound=bound)
            elif path != "none":
                t[name] = zeros(site.d_out if path == "vector" else 1)
        return t

    def delta(self, t: Tensors, site: Site) -> Tensor:
        def path(name: str) -> Tensor:
            return t[name].unsqueeze(-1) if name in t else t[f"{name}_d"] @ t[f"{name}_u"]

        if self.path_A == "none":
            return path("B").expand(*path("B").shape[:-2], site.d_out, site.d_in)
        scaled = t["W"] * path("A")
        return scaled if self.path_B == "none" else scaled + path("B")


register("glora", "optimization", __doc__, GLoRA())
