"""AuroRA: y = W x + s B σ(A x) (eq. 4), σ an adaptive non-linear layer.

σ(z) = tanh(W_p tanh(z)) + W_s s(z): a fixed part (eq. 6) with a trained r x r projection, and a
learned part (eq. 7) from the B-spline basis functions of z on a uniform grid over [-1, 1],
s_j(z) = Σ_i B_j(z_i). The paper has no factor s, which is 1 here by default.

:summary: A tanh and a learned spline between A and B
:equation: y = W x + s B (tanh(W_p tanh(A x)) + W_s s(A x))
:trap: It is not linear in x, so there is no dW and it cannot be merged.
:trap: The splines are 0 where |A x| is well above 1: such inputs only see the tanh part.
:trap: Each basis function is summed over the r inputs before W_s.
:trap: The paper's rank is 2 throughout.
:title: AuroRA: Breaking Low-Rank Bottleneck of LoRA with Nonlinear Mapping
:authors: Haonan Dong, Wenhao Zhu, Guojie Song, Liang Wang
:source: arXiv 2505.18738, 2025: eqs. 4 to 8, sections 2.2 and 2.3 of the NeurIPS text
:verified: paper (NeurIPS text, eqs. 3 to 8), and for the spline's grid, order and start equal
    numbers from the package aurora-peft, made from the authors' code
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import Count, CountOrZero, NonNegative
from loralab.methods import register
from loralab.methods.expansion.lora import normal, plain_pair, uniform
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

    grid: Count = 5
    order: CountOrZero = 3
    noise: NonNegative = 0.1

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return LoRA's A and B = 0, W_p [r, r] Xavier-normal and W_s [r, grid + order]."""
        r = site.rank
        return plain_pair(site, evidence) | {
            "W_p": normal(evidence, "W_p", r, r, std=r**-0.5),
            "W_s": uniform(evidence, "W_s", r, self.grid + self.order, bound=self.noise),
        }

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        z = x @ t["A"].mT
        fixed = (z.tanh() @ t["W_p"].mT).tanh()
        learned = b_splines(z, self.grid, self.order).sum(-2) @ t["W_s"].mT
        return (fixed + learned) @ t["B"].mT


register("aurora", "optimization", __doc__, AuroRA())
