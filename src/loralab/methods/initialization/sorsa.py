"""SORSA, arXiv 2409.00055: W = W_r + U_p diag(S_p) V_pᵀ, the leading triplets of W trained.

They are kept near orthonormal by L_reg = ‖U_pᵀU_p - I‖_F + ‖V_pᵀV_p - I‖_F.

The rest W_r is not stored: the start is anchored, as PiSSA's is. The paper steps by γ ∇L_reg beside
η ∇L, which is the weight γ / η = 4e-4 / 3e-5 in the loss.

:summary: Trains W's leading singular triplets, the vectors kept near orthonormal
:equation: dW = s (U diag(S) V^T - U0 diag(S0) V0^T) + g (|U^T U - I|^2 + |V^T V - I|^2)
:trap: The regulariser belongs to training only, never to the reported loss.
:trap: The authors' code averages the regulariser over all matrices; here every site has its own, as
    in the formula.
:trap: The weight is gamma / eta: it does not follow the learning rate.
:title: SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large
    Language Models
:authors: Yang Cao, Zhao Song
:source: arXiv 2409.00055, 2024: section on the orthonormal regularizer
:verified: authors' code (Gunale0926/SORSA, sorsalib/src/sorsa/layer.py) and the first author's
    explanation; the survey arXiv 2601.22708 for the squares
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.recipe import Evidence, Form, Site, Start, Tensors


@dataclass(frozen=True)
class SingularTriplets(Form):
    """Trained singular vectors U [out, r], Vh [r, in] and values S [r].

    Args:
        gamma: weight of the regulariser in the training loss, 0 or more.
        squared: square both norms (the survey arXiv 2601.22708). The paper and its code do not,
            but then the first gradients are the direction of the rounding errors of the SVD, for
            ‖M‖ has slope 1 all the way down to M = 0.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"U", "S", "Vh"})

    gamma: float = 4e-4 / 3e-5
    squared: bool = True

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise UserError(f"gamma of SORSA must not be negative, not {self.gamma!r}")

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return W's leading singular vectors U, Vh, and S = 0, which the Start fills."""
        W, r = evidence.weight, site.rank
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        return {"U": U[:, :r].contiguous(), "S": W.new_zeros(r), "Vh": Vh[:r].contiguous()}

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return t["U"] * t["S"].unsqueeze(-2), t["Vh"]

    def penalty(self, t: Tensors, site: Site) -> Tensor | None:
        one = torch.eye(t["S"].shape[-1], dtype=t["S"].dtype, device=t["S"].device)
        U, V = t["U"].mT @ t["U"] - one, t["Vh"] @ t["Vh"].mT - one
        squares = [M.square().sum((-2, -1)) for M in (U, V)]
        if self.squared:
            return self.gamma * sum(squares)  # type: ignore[return-value]
        floor = torch.finfo(one.dtype).eps ** 2  # the root's slope stays finite at 0
        return self.gamma * sum((s + floor).sqrt() for s in squares)  # type: ignore[return-value]


@dataclass(frozen=True)
class LeadingValues(Start):
    """The r leading singular values of W, divided by s as in PiSSA, beside the Form's vectors."""

    pair_only: ClassVar[bool] = False
    singles_out: ClassVar[frozenset[str]] = frozenset({"U", "S", "Vh"})
    anchored = True
    seeded = False

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        return {"S": torch.linalg.svdvals(evidence.weight)[: site.rank] / evidence.scale}


register("sorsa", "initialization", __doc__, SingularTriplets(), start=LeadingValues())
