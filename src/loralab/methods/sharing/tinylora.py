"""TinyLoRA: W' = W + U_r Σ_r (Σ_i v_i P_i) V_rᵀ, v in R^u trained.

The P_i [r, r] are random and frozen, and one v may serve many layers: 13 numbers for a model.

:summary: A vector of a few numbers, through fixed random matrices, between singular bases
:equation: dW = U_r S_r (sum_i v_i P_i) V_r^T, only v trained
:trap: The paper's rank is 2: a larger one adds frozen random directions, no parameters.
:trap: So few numbers suffice with reinforcement learning; supervised training needs 100 to 1000
    times as many for the same result.
:trap: Alpha has no effect, and learning rates are far above LoRA's.
:title: Learning to Reason in 13 Parameters
:authors: John X. Morris, Niloofar Mireshghallah, Mark Ibrahim, Saeed Mahloujifar
:source: arXiv 2602.04118, 2026: section 4.0.2, the update rule
:verified: paper (sections 4 and 7) and equality with installed PEFT from equal bases; PEFT splits
    S_r between them (sigma_side='both')
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from loralab.bounds import Count
from loralab.methods import register
from loralab.methods.expansion.lora import normal
from loralab.methods.optimization._unscaled import NoAlpha
from loralab.methods.sharing._bases import SVDBases, random_bases
from loralab.recipe import Evidence, Site, Tensors


@dataclass(frozen=True)
class TinyLoRA(NoAlpha):
    """LoRA-XS whose core is a few numbers in a random subspace.

    Args:
        u: length of v.
        tie: which layers share one v: "none", the layers of a "layer" (a block), of a "kind", or
            the whole "model".
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"U_r", "V_r", "P"})
    owns: ClassVar[frozenset[str]] = frozenset({"U_r", "V_r", "P", "v"})

    u: Count = 64
    tie: Literal["none", "layer", "kind", "model"] = "none"

    @property
    def shared(self) -> Mapping[str, str]:  # type: ignore[override]
        """The vector v, if layers are tied."""
        return {} if self.tie == "none" else {"v": self.tie}

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return random bases, P [u, r, r] and v [u] = 0.

        The paper does not say how P is drawn; N(0, 1/r) is PEFT's.
        """
        r = site.rank
        P = normal(evidence, "P", self.u, r, r, std=r**-0.5)
        return random_bases(site, evidence) | {"P": P, "v": evidence.weight.new_zeros(self.u)}

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        R = (t["v"].unsqueeze(-2) @ t["P"].flatten(-2)).unflatten(-1, t["P"].shape[-2:])
        return t["U_r"] @ R.squeeze(-3), t["V_r"]


register("tinylora", "sharing", __doc__, TinyLoRA(), start=SVDBases(sigma_side="out"))
