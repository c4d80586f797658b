"""HiRA (openreview TwJrTz9cRS): W' = W0 ∘ (1 + B A), so that the rank of dW is up to rank(W0) r.

The authors' code has no factor beside B A, so alpha = r here gives s = 1; the survey
arXiv 2601.22708 writes α / r.

:summary: Scales every weight by 1 plus a low-rank product: high rank at LoRA's count
:equation: dW = W ∘ s (B A)
:trap: dW is of W's small size times B A, so rates 10 to 1000 times LoRA's are needed.
:trap: An entry of W that is 0 cannot be changed.
:trap: W o (B A) x is not (W x) o (B A x).
:title: HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models
:authors: Qiushi Huang, Tom Ko, Zhan Zhuang, Lilian Tang, Yu Zhang
:source: ICLR 2025, 2025: section 3, W' = W0 + W0 ∘ (B A)
:verified: authors' code (hqsiswiliam/hira hira/tuners/lora.py) and equality with installed PEFT;
    the paper's text was not to be had
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.methods import register
from loralab.methods.expansion.lora import plain_pair
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class HiRA(Form):
    """A low-rank product that multiplies the weight element by element."""

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    rank_axis: ClassVar[dict[str, int]] = {"A": -2, "B": -1}
    reads: ClassVar[frozenset[str]] = frozenset({"W"})

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        return plain_pair(site, evidence)

    def delta(self, t: Tensors, site: Site) -> Tensor:
        return t["W"] * (t["B"] @ t["A"])


register("hira", "expansion", __doc__, HiRA())
