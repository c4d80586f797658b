"""RST-LoRA: h ← h + s B A (x ⊙ (1 + γ)), γ >= 0 the weight of each
token, which the paper derives from the rhetorical structure of the document (RST).

The weights are the user's: `adapter.given(token_weights=γ)` with γ [rows, tokens],
[rows, tokens, 1] or [rows, tokens, in], the last for the paper's variants with relation labels.
Without them γ = 0, which is LoRA. (The authors' code scales the encoder's embeddings instead, which
the frozen weights then see too.)

:summary: The low-rank path sees each token weighted by how much it matters to the text
:equation: y = W x + s B A (x ⊙ (1 + gamma)), gamma >= 0 given per token
:trap: The weights belong to the tokens of the input, so there is no dW to merge.
:trap: Weights left out are 0: it is then LoRA, in evaluation as in training.
:trap: They must fit every adapted layer: leave out layers that see other tokens, such as the
    decoder's.
:title: RST-LoRA: A Discourse-Aware Low-Rank Adaptation for Long Document Abstractive Summarization
:authors: Dongqi Liu, Vera Demberg
:source: arXiv 2405.00657, 2024: section 4.2
:verified: a public transcript of the paper's text; authors' code (dongqi-me/RST_LoRA)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.methods import register
from loralab.methods.expansion.lora import plain_pair
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class RSTLoRA(Form):
    """A pair whose input is weighted token by token."""

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    rank_axis: ClassVar[Mapping[str, int]] = {"A": -2, "B": -1}
    reads: ClassVar[frozenset[str]] = frozenset({"token_weights"})
    layers: ClassVar[frozenset[str]] = frozenset({"Linear", "Conv1D"})

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        return plain_pair(site, evidence)

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        gamma = t.get("token_weights")
        if gamma is not None:
            x = x * (1 + (gamma if gamma.dim() == x.dim() else gamma.unsqueeze(-1))).to(x)
        return (x @ t["A"].mT) @ t["B"].mT


register("rst_lora", "optimization", __doc__, RSTLoRA())
