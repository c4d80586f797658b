"""LoRA-XS: h = x W + x A R B, A = U_r Σ_r, B = V_rᵀ, train R only.

Here W = U Σ Vᵀ is [out, in], U_r [out, r] and V_r [r, in] are frozen, and V_r takes Σ_r.

:summary: Trains r x r numbers per layer between frozen singular vectors of the weight
:equation: dW = (alpha / r) U_r R S_r V_r^T, W = U S V^T, only R trained
:trap: The paper has W as [in, out] and multiplies from the right, x W: its A = U_r S_r is on the
    input's side, as Σ_r is here.
:trap: S_r stands in the update, so large singular values make large steps.
:trap: r² parameters per layer: ranks of 4 to 64, and learning rates above LoRA's.
:title: LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters
:authors: Klaudia Bałazy, Mohammadreza Banaei, Karl Aberer, Jacek Tabor
:source: arXiv 2405.17604, 2024: eqs. 2 and 3
:verified: authors' code (MohammadrezaBanaei/LoRA-XS, utils/initialization_utils.py)
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loralab.bounds import CountOrZero, NonNegative
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import normal
from loralab.methods.initialization._svd import fast_svd
from loralab.methods.sharing._shared import random_bases
from loralab.recipe import Evidence, Form, Site, Start, Tensors


@dataclass(frozen=True)
class LoRAXS(Form):
    """An r x r matrix between frozen bases.

    Args:
        sigma: spread of R's normal start, 1e-5 in the paper: a trace off the base. dW is linear in
            R, so 0 is the same training measured from that start.
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"U_r", "V_r"})
    owns: ClassVar[frozenset[str]] = frozenset({"U_r", "R", "V_r"})

    sigma: NonNegative = 0.0

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return random bases (the paper's ablation) and R [r, r]."""
        R = normal(evidence, "R", site.rank, site.rank, std=self.sigma)
        return random_bases(site, evidence) | {"R": R}

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return t["U_r"] @ t["R"], t["V_r"]


@dataclass(frozen=True)
class SVDBases(Start):
    """Bases from r singular triplets of W.

    Args:
        sigma_side: where Σ_r goes: "in" with V_r, "out" with U_r, "both" half each.
        part: "top" or, the paper's ablation, "bottom" triplets.
        niter: power iterations of the fast SVD (10 in the authors' first code); None is exact.
    """

    pair_only: ClassVar[bool] = False
    singles_out: ClassVar[frozenset[str]] = frozenset({"U_r", "V_r"})

    sigma_side: Literal["in", "out", "both"] = "in"
    part: Literal["top", "bottom"] = "top"
    niter: CountOrZero | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.niter is not None and self.part == "bottom":
            raise UserError("the fast SVD finds top triplets only: part = 'bottom' takes no niter")

    @property
    def seeded(self) -> bool:  # type: ignore[override]
        """The exact SVD draws nothing."""
        return self.niter is not None

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        if self.niter is None:
            U, S, Vh = torch.linalg.svd(evidence.weight, full_matrices=False)
            keep = slice(site.rank) if self.part == "top" else slice(len(S) - site.rank, None)
            U, S, Vh = U[:, keep], S[keep], Vh[keep]
        else:
            U, S, Vh = fast_svd(
                evidence.weight, site.rank, self.niter, evidence.generator("sketch")
            )
        power = {"in": 0.0, "both": 0.5, "out": 1.0}[self.sigma_side]
        return {"U_r": U * S**power, "V_r": (S ** (1 - power))[:, None] * Vh}


register("lora_xs", "sharing", __doc__, LoRAXS(), start=SVDBases())
