"""LoRA-XS, arXiv 2405.17604, eqs. 2 and 3: h = x W + x A R B, A = U_r Σ_r, B = V_rᵀ, train R only.

There W = U Σ Vᵀ is [in, out]. Here, with W [out, in], dW = s U_r R V_r with U_r [out, r] and
V_r [r, in] frozen, and Σ_r goes with V_r, the input's side.

:summary: Trains r x r numbers per layer between frozen singular vectors of the weight
:equation: dW = (alpha / r) U_r R S_r V_r^T, W = U S V^T, only R trained
:trap: The paper multiplies from the right, x W: its A = U_r S_r is on the input's side.
:trap: S_r stands in the update, so large singular values make large steps.
:trap: r² parameters per layer: ranks of 4 to 64, and learning rates above LoRA's.
:title: LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters
:authors: Klaudia Bałazy, Mohammadreza Banaei, Karl Aberer, Jacek Tabor
:source: arXiv 2405.17604, 2024: eqs. 2 and 3
:verified: authors' code (MohammadrezaBanaei/LoRA-XS, utils/initialization_utils.py)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.methods.initialization.pissa import fast_svd
from loralab.methods.sharing.vb_lora import normal
from loralab.recipe import Evidence, Form, Site, Start, Tensors


def random_bases(site: Site, evidence: Evidence) -> Tensors:
    """Return U_r [out, r] and V_r [r, in], Kaiming-uniform: the paper's ablation."""
    r, m, n = site.rank, site.d_out, site.d_in
    return {
        "U_r": uniform(evidence, "U_r", m, r, bound=r**-0.5),
        "V_r": uniform(evidence, "V_r", r, n, bound=n**-0.5),
    }


@dataclass(frozen=True)
class LoRAXS(Form):
    """An r x r matrix between frozen bases.

    Args:
        sigma: spread of R's normal start. The paper's 1e-5 leaves the base by a trace; since dW is
            linear in R, 0 is the same training measured from that start.
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"U_r", "V_r"})
    owns: ClassVar[frozenset[str]] = frozenset({"U_r", "R", "V_r"})

    sigma: float = 0.0

    def __post_init__(self) -> None:
        if not self.sigma >= 0:
            raise UserError(f"sigma of LoRA-XS must not be negative, and is {self.sigma!r}")

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return random bases and R [r, r]."""
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
        niter: power iterations of the fast SVD (10 in the authors' first code); None for the exact
            one.
    """

    pair_only: ClassVar[bool] = False
    singles_out: ClassVar[frozenset[str]] = frozenset({"U_r", "V_r"})

    sigma_side: str = "in"
    part: str = "top"
    niter: int | None = None

    def __post_init__(self) -> None:
        if self.sigma_side not in ("in", "out", "both"):
            raise UserError(f"sigma_side is 'in', 'out' or 'both', not {self.sigma_side!r}")
        if self.part not in ("top", "bottom"):
            raise UserError(f"part is 'top' or 'bottom', not {self.part!r}")
        if self.niter is not None and (self.niter < 0 or self.part == "bottom"):
            raise UserError("the fast SVD finds top triplets only, with niter >= 0 iterations")

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
            sketch = evidence.generator("sketch")
            U, S, Vh = fast_svd(evidence.weight, site.rank, self.niter, sketch)
        power = {"in": 0.0, "both": 0.5, "out": 1.0}[self.sigma_side]
        return {"U_r": U * S**power, "V_r": (S ** (1 - power))[:, None] * Vh}


register("lora_xs", "sharing", __doc__, LoRAXS(), start=SVDBases())
