"""LoRA-SB, arXiv 2411.19557: W = W0 + s B R A, only R [r, r] trained, with B = U_r, A = V_rᵀ and
R = S_r / s from the first update of full fine-tuning, ΔW = -η sign(Σ ∇W) = U S Vᵀ.

B and A are orthonormal, so the step of R is the best one for W whatever s (theorems 3 and 5). It
starts at W0 + U_r S_r V_rᵀ, one step of η ahead of the base, unless `anchored`.
B R A is LoRA-XS's form, with U_r for B and V_r for A.

:summary: Trains an r x r core between frozen singular vectors of the first update
:equation: dW = s B R A, U S V^T = -eta sign(G), B = U_r, A = V_r^T frozen, R0 = S_r / s
:trap: Only r^2 numbers are trained: ranks of 32 to 96 are usual.
:trap: It is the sign of the summed gradient whose triplets are taken, not the gradient.
:trap: The start depends on eta, which should be full fine-tuning's learning rate.
:title: Initialization using Update Approximation is a Silver Bullet for Extremely Efficient
    Low-Rank Fine-Tuning
:authors: Kaustubh Ponkshe, Raghav Singhal, Eduard Gorbunov, Alexey Tumanov, Samuel Horvath,
    Praneeth Vepakomma
:source: arXiv 2411.19557, 2024: section 2, theorems 3, 5 and 6
:verified: authors' code (RaghavSinghal10/lora-sb, utils/gradient_utils.py), a public reproduction's
    digest of the paper, LoRAFactory's lora_sb.py
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from loralab.bounds import CountOrZero, Positive
from loralab.methods import register
from loralab.methods.budgeting.gora import gradient_of
from loralab.methods.initialization._svd import triplets
from loralab.methods.sharing.lora_xs import LoRAXS
from loralab.recipe import Evidence, Site, Start, Tensors


@dataclass(frozen=True)
class UpdateApproximation(Start):
    """The singular triplets of full fine-tuning's first step.

    Args:
        eta: η, the learning rate of that step.
        sign: take the gradient's sign, AdamW's first step; False takes the gradient itself
            (LoRAFactory, the survey arXiv 2601.22708).
        anchored: subtract the start, so that step 0 is the base; the paper does not.
        niter: power iterations of the fast SVD; None for the exact SVD.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    departs: ClassVar[bool] = True
    pair_only: ClassVar[bool] = False
    singles_out: ClassVar[frozenset[str]] = frozenset({"U_r", "R", "V_r"})

    eta: Positive = 1e-4
    sign: bool = True
    anchored: bool = False
    niter: CountOrZero | None = 4

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        G = gradient_of(evidence, "LoRA-SB")
        update = -self.eta * (G.sign() if self.sign else G)
        U, S, Vh = triplets(update, site.rank, self.niter, evidence)
        return {
            "U_r": U.contiguous(),
            "V_r": Vh.contiguous(),
            "R": torch.diag(S / evidence.scale),
        }


register("lora_sb", "initialization", __doc__, LoRAXS(), start=UpdateApproximation())
