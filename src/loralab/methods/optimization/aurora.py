"""AuroRA, arXiv 2505.18738, section 3.2: y = W x + s B σ(A x), σ an adaptive non-linear layer.

σ(z) = tanh(W_p tanh(z)) + W_s s(z): a fixed part with a trained r x r projection, and a learned
part from the B-spline basis functions of z on a uniform grid over [-1, 1], s_j(z) = Σ_i B_j(z_i).

:summary: A tanh and a learned spline between A and B
:equation: y = W x + s B (tanh(W_p tanh(A x)) + W_s s(A x))
:trap: It is not linear in x, so there is no dW and it cannot be merged.
:trap: The splines are 0 where |A x| is well above 1: such inputs only see the tanh part.
:trap: Each basis function is summed over the r inputs before W_s.
:title: AuroRA: Breaking Low-Rank Bottleneck of LoRA with Nonlinear Mapping
:authors: Haonan Dong, Wenhao Zhu, Guojie Song, Liang Wang
:source: arXiv 2505.18738, 2025: section 3.2
:verified: survey arXiv 2601.22708, LoRAFactory (aurora.py), and equal numbers from the package
    aurora-peft, made from the authors' code; the paper's text was not to be had
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import plain_pair, uniform
from loralab.recipe import LAYERS, Evidence, Form, Site, Tensors


def b_splines(z: Tensor, grid: int, order: int) -> Tensor:
    """Return the grid + order B-splines at z, [*, grid + order], by the Cox-de Boor recursion.

    The knots are those of `grid` equal intervals over [-1, 1], going on to both sides.
    """
    u = ((z + 1) * (grid / 2) + order).unsqueeze(-1)  # the knots are 0, 1, 2, ...
    j = torch.arange(grid + 2 * order, device=z.device)
    N = ((u >= j) & (u < j + 1)).to(z.dtype)
    for k in range(1, order + 1):
        j = j[:-1]
        N = ((u - j) * N[..., :-1] + (j + k + 1 - u) * N[..., 1:]) / k
    return N


@dataclass(frozen=True)
class AuroRA(Form):
    """A non-linear layer between A and B.

    Args:
        grid: intervals of the spline's grid over [-1, 1]; outside of its reach it is 0.
        order: the splines' degree.
        noise: W_s starts as U(±noise).
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "W_p", "W_s"})
    layers: ClassVar[frozenset[str]] = LAYERS - {"Embedding"}
    recomputed: ClassVar[frozenset[str]] = frozenset({"branch"})  # grid + order splines per rank

    grid: int = 5
    order: int = 3
    noise: float = 0.1

    def __post_init__(self) -> None:
        if self.grid < 1 or self.order < 0 or not self.noise >= 0:
            raise UserError(
                "AuroRA needs grid >= 1, order >= 0 and noise >= 0, not "
                f"{self.grid}, {self.order} and {self.noise}"
            )

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return LoRA's A and B = 0, W_p [r, r] Xavier-normal and W_s [r, grid + order]."""
        r = site.rank
        g = evidence.generator("W_p")
        W_p = torch.randn(r, r, generator=g, dtype=torch.float64) * r**-0.5
        return plain_pair(site, evidence) | {
            "W_p": W_p.to(evidence.weight),
            "W_s": uniform(evidence, "W_s", r, self.grid + self.order, bound=self.noise),
        }

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        z = x @ t["A"].mT
        fixed = (z.tanh() @ t["W_p"].mT).tanh()
        learned = b_splines(z, self.grid, self.order).sum(-2) @ t["W_s"].mT
        return (fixed + learned) @ t["B"].mT


register("aurora", "optimization", __doc__, AuroRA())
