"""DeLoRA: dW = (λ ‖W‖ / r) B Ξ A, Ξ = diag(1 / (‖b_i‖ ‖a_i‖)).

Every rank-one term has norm 1, so λ ‖W‖ bounds the update's length and B, A learn its direction.
λ is trained. Eq. 9 subtracts the update's first value from W; here the start is anchored instead,
which is the same function and leaves W as it is.

:summary: Bounds the update: directions are normalised, one trained number is its strength
:equation: dW = (lambda |W| / r) sum_i b_i a_i^T / (|b_i| |a_i|), minus its first value
:trap: B = 0 has no direction: a floor under |b| makes the first gradients huge.
:trap: The bound holds for the update before its first value is subtracted.
:trap: The paper trains lambda at half the rate of A and B, and these at 1e-2.
:title: DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation
:authors: Massimo Bini, Leander Girrbach, Zeynep Akata
:source: arXiv 2503.18225, 2025: eqs. 5, 8 and 9, section 2.2, appendix B
:verified: paper and equality with installed PEFT (authors' code) for the form; PEFT starts from B =
    0 with a floor on the norms, the paper advises against it
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from loralab.bounds import Positive
from loralab.methods import register
from loralab.methods.expansion.lora import plain_pair, uniform
from loralab.recipe import Evidence, Form, Site, Start, Tensors


@dataclass(frozen=True)
class DeLoRA(Form):
    """Normalised rank-one terms times a trained bound.

    Args:
        bound: λ at the start; the paper's 8 for language models (4 or 12 on GLUE).
        norm: "column" takes ‖W_:j‖ for each input j (the authors' code, with which the paper's λ
            were found), "frobenius" one ‖W‖ for all.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "bound"})
    frozen: ClassVar[frozenset[str]] = frozenset({"norm"})
    rank_axis: ClassVar[dict[str, int]] = {"A": -2, "B": -1}

    bound: Positive = 8.0
    norm: Literal["column", "frobenius"] = "column"

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return LoRA's A and B = 0, λ [1] and ‖W‖ [in] (or [1]); alone this is PEFT's start."""
        W = evidence.weight
        norm = W.norm(dim=0) if self.norm == "column" else W.norm().view(1)
        own = {"bound": W.new_full((1,), self.bound), "norm": norm}
        return plain_pair(site, evidence) | own

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        A, B = t["A"], t["B"]
        # The floor is PEFT's and serves vectors that are 0; a random start is far above it.
        lengths = B.norm(dim=-2).clamp_min(1e-4) * A.norm(dim=-1).clamp_min(1e-4)
        xi = t["bound"] / (A.shape[-2] * lengths)
        return B * xi.unsqueeze(-2), A * t["norm"].unsqueeze(-2)


@dataclass(frozen=True)
class DeLoRAStart(Start):
    """A Kaiming-uniform B beside A; the update is measured from where it begins (eq. 9)."""

    pair_only: ClassVar[bool] = False
    singles_out: ClassVar[frozenset[str]] = frozenset({"bound"})
    anchored = True

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        return {"B": uniform(evidence, "B", site.d_out, site.rank, bound=site.rank**-0.5)}


register("delora", "optimization", __doc__, DeLoRA(), start=DeLoRAStart())
