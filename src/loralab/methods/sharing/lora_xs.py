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
:verified: authors' code (MohammadrezaBanaei/LoRA-XS, utils/initialization_utils.py) and TinyLoRA's
    paper, which restates it; the paper's own text was not to be had
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.bounds import NonNegative
from loralab.methods import register
from loralab.methods.expansion.lora import normal
from loralab.methods.sharing._bases import SVDBases, random_bases
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class LoRAXS(Form):
    """An r x r matrix between frozen bases.

    Args:
        sigma: spread of R's normal start, a trace off the base; with 0 it is the base.
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"U_r", "V_r"})
    owns: ClassVar[frozenset[str]] = frozenset({"U_r", "R", "V_r"})

    sigma: NonNegative = 1e-5

    @property
    def departs(self) -> bool:
        return self.sigma > 0

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return random bases (the paper's ablation) and R [r, r]."""
        R = normal(evidence, "R", site.rank, site.rank, std=self.sigma)
        return random_bases(site, evidence) | {"R": R}

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return t["U_r"] @ t["R"], t["V_r"]


register("lora_xs", "sharing", __doc__, LoRAXS(), start=SVDBases())
