"""Tied-LoRA: z = W x + (α / r) Λ_v B Λ_u A x, with A and B tied.

One pair A, B serves all layers of a kind; the diagonals u [r] and v [out] are each layer's own. Of
the paper's configurations TL6 trains all four, TL5 A and B alone (train="AB").

:summary: One trained pair for all layers of a kind, two trained diagonals per layer
:equation: dW = (alpha / r) diag(v) B diag(u) A, A and B shared by the layers of a kind
:trap: The paper ties one fused projection; here a kind's pair fits its largest layer and is cut.
:trap: The gradients of all layers of a kind add up in A and B: they move faster than LoRA's.
:trap: With train='uv' and a random frozen pair it is VeRA but for its scales.
:title: Tied-LoRA: Enhancing parameter efficiency of LoRA with Weight Tying
:authors: Adithya Renduchintala, Tugrul Konuk, Oleksii Kuchaiev
:source: arXiv 2311.09578, 2023: eq. 2
:verified: quotations (among them α = r, our default; TL5 4dr, TL6 12.5% of LoRA), survey arXiv
    2601.22708, counts (README of yuhua-zhou/BSLoRA); the paper's text was not to be had
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.methods.sharing._shared import cut
from loralab.recipe import Evidence, Form, Site, Tensors

PARTS = ("A", "B", "u", "v")


@dataclass(frozen=True)
class TiedLoRA(Form):
    """A tied pair with a diagonal behind each factor.

    Args:
        train: which of A, B, u and v are trained, written one after the other; B or v must be.
    """

    shared: ClassVar[Mapping[str, str]] = {"A": "kind", "B": "kind"}
    owns: ClassVar[frozenset[str]] = frozenset(PARTS)

    train: str = "ABuv"

    def __post_init__(self) -> None:
        super().__post_init__()
        once = len(set(self.train)) == len(self.train) and set(self.train) <= set(PARTS)
        if not once or not {"B", "v"} & set(self.train):
            raise UserError(
                "train of TiedLoRA is made of the letters A, B, u, v, B or v among them, not "
                f"{self.train!r}"
            )

    @property
    def frozen(self) -> frozenset[str]:  # type: ignore[override]
        """The rest of A, B, u and v."""
        return frozenset(PARTS) - set(self.train)

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [r, in], B [out, r], u [r] = 1 and v [out] = 1 (our reading).

        A trained B starts at 0. Beside a frozen random B it is v that starts at 0.
        """
        r, m, n = site.rank, site.d_out, site.d_in
        zeros, ones = evidence.weight.new_zeros, evidence.weight.new_ones
        trained = "B" in self.train
        return {
            "A": uniform(evidence, "A", r, n, bound=n**-0.5),
            "B": zeros(m, r) if trained else uniform(evidence, "B", m, r, bound=r**-0.5),
            "u": ones(r),
            "v": ones(m) if trained else zeros(m),
        }

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        B, A = cut(t, site)
        return t["v"].unsqueeze(-1) * B, t["u"].unsqueeze(-1) * A


register("tied_lora", "sharing", __doc__, TiedLoRA())
