"""LoRA-GA, arXiv 2407.05000, section 3: ∇W = U S Vᵀ; A, B from its singular vectors, both times
m^¼/√γ with m the outputs, so that the first step of B A follows full fine-tuning's.

Split "ArB2r" (the authors' default): A0 = (m^¼/√γ) V[:, :r]ᵀ, B0 = (m^¼/√γ) U[:, r:2r]. The scale
is rsLoRA's and the start is anchored. PEFT's version of this name is another method: it multiplies
B by the singular values and scales B alone.

:summary: Starts along the leading singular directions of the gradient
:equation: A0 = (m^1/4 / sqrt(gamma)) V[:, :r]^T, B0 = (m^1/4 / sqrt(gamma)) U[:, r:2r]
:trap: m is the number of outputs, for both factors.
:trap: The singular values play no part: A0 and B0 have orthogonal rows and columns.
:trap: The scale is alpha / sqrt(r); with alpha / r the start is sqrt(r) too small.
:title: LoRA-GA: Low-Rank Adaptation with Gradient Approximation
:authors: Shaowen Wang, Linxi Yu, Jian Li
:source: arXiv 2407.05000, 2024: section 3 and algorithm 1
:verified: authors' code (Outsider565/LoRA-GA, lora_ga_init, scale stable); the paper's text was not
    to be had
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from loralab.bounds import CountOrZero, OneOf, Positive
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.budgeting.gora import gradient_of
from loralab.methods.initialization._svd import triplets
from loralab.methods.optimization.rslora import RSLORA_FORM
from loralab.recipe import Evidence, Site, Start, Tensors

# Which of the first 2r singular vectors go to A and to B, by the authors' names.
SPLITS = {
    "ArB2r": lambda r: (slice(0, r), slice(r, 2 * r)),
    "A2rBr": lambda r: (slice(r, 2 * r), slice(0, r)),
    "ArBr": lambda r: (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
}


@dataclass(frozen=True)
class LoRAGA(Start):
    """Singular vectors of the gradient at the base.

    Args:
        gamma: γ; larger starts smaller.
        split: which singular vectors go where.
        niter: power iterations of the fast SVD with a sketch of 4r, as in the authors' code; None
            for the exact SVD.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    anchored = True

    gamma: Positive = 16.0
    split: Annotated[str, OneOf(SPLITS)] = "ArB2r"
    niter: CountOrZero | None = 4

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        G, r = gradient_of(evidence, "LoRA-GA"), site.rank
        if 2 * r > min(G.shape):
            raise UserError(
                f"LoRA-GA takes 2 x rank singular vectors, so rank {r} is too large for layer "
                f"{site.name} ({site.d_out} x {site.d_in}); use at most {min(G.shape) // 2}"
            )
        U, _, Vh = triplets(G, 2 * r, self.niter, evidence, oversample=2 * r)
        rows, columns = SPLITS[self.split](r)
        factor = site.d_out**0.25 / self.gamma**0.5
        return {"A": factor * Vh[rows], "B": factor * U[:, columns]}


register("lora_ga", "initialization", __doc__, RSLORA_FORM, start=LoRAGA())
