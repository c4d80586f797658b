"""VB-LoRA: a stretch of b entries of A's rows or B's columns is Σ_{s in TopK(σ)} softmax(TopK(σ))_s
α_s, a mixture of k of the h vectors α_s of one bank, with trained logits σ [h] of its own.

:summary: Both factors are top-k mixtures of the vectors of one bank for the whole model
:equation: dW = B A; stretches of A and B are sum_top-k softmax(logits)_s bank_s
:trap: Only the k largest logits of a stretch get a gradient; which they are changes while training.
:trap: Step 0 is not the base, as A and B are random; anchored=True subtracts B0 A0.
:trap: A stretch stores k - 1 weights and k indices; h logits train, at ten times the bank's rate.
:title: VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks
:authors: Yang Li, Shaobo Han, Shihao Ji
:source: arXiv 2405.15179, 2024: eq. 3.3, sections 3.2 and 3.3
:verified: paper (sections 3 and 4.1); equality with installed PEFT, which the authors wrote
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.bounds import Count, Positive
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import normal, uniform
from loralab.methods.optimization._unscaled import NoAlpha
from loralab.methods.sharing._shared import Anchorable, BankRates
from loralab.recipe import Evidence, Site, Tensors


@dataclass(frozen=True)
class VBLoRA(NoAlpha):
    """Both factors put together from a shared vector bank.

    Args:
        n_vectors, k: h and k; 90 to 2048 and 2 in the paper; PEFT's 256 here.
        length: b; the last stretch of a side is cut where the paper and PEFT ask for a divisor.
        bound, std: half-width of the bank's uniform start, spread of the logits' normal one.
    """

    shared: ClassVar[Mapping[str, str]] = {"bank": "model"}
    owns: ClassVar[frozenset[str]] = frozenset({"bank", "logits_A", "logits_B"})
    n_vectors: Count = 256
    length: Count = 256
    k: Count = 2
    bound: Positive = 0.02
    std: Positive = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k > self.n_vectors:
            raise UserError(f"k of VBLoRA is between 1 and n_vectors, not {self.k}")

    @property
    def departs(self) -> bool:
        return True

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return bank [h, b], logits_A [r, in / b, h] and logits_B [out / b, r, h]."""
        h, b, r = self.n_vectors, self.length, site.rank
        wide, high = (-(-side // b) for side in (site.d_in, site.d_out))
        return {
            "bank": uniform(evidence, "bank", h, b, bound=self.bound),
            "logits_A": normal(evidence, "logits_A", r, wide, h, std=self.std),
            "logits_B": normal(evidence, "logits_B", high, r, h, std=self.std),
        }

    def _mixed(self, logits: Tensor, bank: Tensor) -> Tensor:
        """Return [*, p, q, b] for logits [*, p, q, h]."""
        top = logits.topk(self.k, dim=-1)
        weights = logits.new_zeros(logits.shape).scatter(-1, top.indices, top.values.softmax(-1))
        return (weights.flatten(-3, -2) @ bank).unflatten(-2, logits.shape[-3:-1])

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        A = self._mixed(t["logits_A"], t["bank"]).flatten(-2)
        B = self._mixed(t["logits_B"], t["bank"]).mT.flatten(-3, -2)
        return B[..., : site.d_out, :], A[..., : site.d_in]


START, RATES = Anchorable(), BankRates()
register("vb_lora", "sharing", __doc__, VBLoRA(), start=START, rule=RATES, aliases=("vblora",))
