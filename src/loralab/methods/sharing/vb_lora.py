"""VB-LoRA: every stretch of b entries of A's rows and B's columns is û = Σ_{s in TopK(σ)}
softmax(TopK(σ))_s α_s, a mixture of k vectors α_s of one bank of h vectors, with trained logits
σ [h] of its own.

:summary: Both factors are top-k mixtures of the vectors of one bank for the whole model
:equation: dW = B A - B0 A0; stretches of A and B are sum_top-k softmax(logits)_s bank_s
:trap: Only the k largest logits of a stretch get a gradient; which they are changes while training.
:trap: The paper's start is not the base: A and B are random. Here it is subtracted.
:trap: What must be stored is small (k indices and weights per stretch), what is trained is not: all
    h logits of every stretch.
:trap: The logits want ten times the bank's learning rate; the trial's rate is the logits'.
:title: VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks
:authors: Yang Li, Shaobo Han, Shihao Ji
:source: arXiv 2405.15179, 2024: section 3
:verified: equality with installed PEFT, which the authors wrote
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import Count, Positive
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import normal, uniform
from loralab.methods.sharing._shared import AnchoredStart
from loralab.recipe import Evidence, Form, Recipe, Site, Tensors
from loralab.training.adamw import AdamW


@dataclass(frozen=True)
class VBLoRA(Form):
    """Both factors put together from a shared vector bank.

    Args:
        n_vectors: h; 90 to 2048 in the paper, growing with the model; PEFT's 256 here.
        length: b. Where it does not divide a side of the layer the last stretch is cut; the paper
            and PEFT ask for a divisor.
        k: vectors per mixture.
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

    def objection(self, recipe: Recipe) -> tuple[str, str] | None:
        if recipe.start.anchored or isinstance(recipe.start, AnchoredStart):
            return None
        return "start", "its first update is not 0, so it needs a start that takes it off the base"

    def scale(self, alpha: float, rank: int) -> float:
        """Return 1: the paper has no alpha."""
        return 1.0

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return bank [h, b], logits_A [r, in / b, h] and logits_B [out / b, r, h]."""
        h, b, r = self.n_vectors, self.length, site.rank
        wide, high = -(-site.d_in // b), -(-site.d_out // b)
        return {
            "bank": uniform(evidence, "bank", h, b, bound=self.bound),
            "logits_A": normal(evidence, "logits_A", r, wide, h, std=self.std),
            "logits_B": normal(evidence, "logits_B", high, r, h, std=self.std),
        }

    def _mixed(self, logits: Tensor, bank: Tensor) -> Tensor:
        """Return [*, p, q, b] for logits [*, p, q, h]."""
        top = logits.topk(self.k, dim=-1)
        weights = torch.zeros_like(logits).scatter(-1, top.indices, top.values.softmax(-1))
        return (weights.flatten(-3, -2) @ bank).unflatten(-2, logits.shape[-3:-1])

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        A = self._mixed(t["logits_A"], t["bank"]).flatten(-2)
        B = self._mixed(t["logits_B"], t["bank"]).mT.flatten(-3, -2)
        return B[..., : site.d_out, :], A[..., : site.d_in]


@dataclass(frozen=True)
class BankRates(AdamW):
    """AdamW with `ratio` times the logits' rate for the bank; 0.001 / 0.01 in the paper."""

    singles_out: ClassVar[frozenset[str]] = frozenset({"bank"})

    ratio: Positive = 0.1

    def lr_ratio(self, name: str) -> float:
        return self.ratio if name == "bank" else 1.0


register(
    "vb_lora",
    "sharing",
    __doc__,
    VBLoRA(),
    start=AnchoredStart(),
    rule=BankRates(),
    aliases=("vblora",),
)
