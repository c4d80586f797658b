"""SORSA: W = W_r + U_p diag(S_p) V_pᵀ, the leading triplets trained and kept near orthonormal.

L_reg = ‖U_pᵀU_p - I‖_F + ‖V_pᵀV_p - I‖_F. The rest W_r is not stored: the start is anchored, as
PiSSA's is. The paper steps by γ ∇L_reg beside η ∇L, which is the weight γ / η = 4e-4 / 3e-5 in the
loss. The authors' code takes the mean of the norms over all trained matrices, 448 in its run
(Llama-2-7B, seven targets); here every site has its own, so the weight of each is γ / η / 448.

:summary: Trains W's leading singular triplets, the vectors kept near orthonormal
:equation: dW = s (U diag(S) V^T - U0 diag(S0) V0^T); loss + g (|U^T U - I| + |V^T V - I|)
:trap: The regulariser belongs to training only, never to the reported loss.
:trap: The weight does not follow the learning rate or the number of layers.
:trap: The authors' code adds the regulariser's gradient after clipping; here it is clipped with the
    loss's.
:title: SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large
    Language Models
:authors: Yang Cao, Zhao Song
:source: arXiv 2409.00055, 2024: section on the orthonormal regularizer
:verified: authors' code (Gunale0926/SORSA, layer.py, trainer.py, scripts/train_sorsa.sh), the first
    author's words, the survey arXiv 2601.22708 for the squares; the paper's text was not to be had
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import NonNegative
from loralab.methods import register
from loralab.methods.initialization._svd import leading_triplets
from loralab.recipe import Evidence, Form, Site, Start, Tensors


@dataclass(frozen=True)
class SingularTriplets(Form):
    """Trained singular vectors U [out, r], Vh [r, in] and values S [r].

    Args:
        gamma: weight of both norms of a site in the training loss.
        squared: square both norms, as the survey does.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"U", "S", "Vh"})

    gamma: NonNegative = 4e-4 / 3e-5 / 448
    squared: bool = False

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return W's leading singular vectors U, Vh, and S = 0, which the Start fills."""
        U, S, Vh = leading_triplets(evidence.weight, site.rank)
        return {"U": U.contiguous(), "S": torch.zeros_like(S), "Vh": Vh.contiguous()}

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return t["U"] * t["S"].unsqueeze(-2), t["Vh"]

    def penalty(self, t: Tensors, site: Site) -> Tensor | None:
        one = torch.eye(t["S"].shape[-1], dtype=t["S"].dtype, device=t["S"].device)
        U, V = t["U"].mT @ t["U"] - one, t["Vh"] @ t["Vh"].mT - one
        squares = torch.stack([M.square().sum((-2, -1)) for M in (U, V)])
        # ‖M‖ has slope 1 down to M = 0, where the SVD's rounding would choose the first steps.
        floor = torch.finfo(one.dtype).eps
        return self.gamma * (squares if self.squared else (squares + floor).sqrt()).sum(0)


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
