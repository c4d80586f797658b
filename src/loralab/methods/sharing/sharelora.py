"""ShareLoRA: dW_i = s B_i A (ShareA), s B A_i (ShareB) or s B A.

The shared factor is one trained tensor for all layers; the paper recommends to share A.

:summary: LoRA with A (or B, or both) in common for many layers
:equation: dW_i = (alpha / r) B_i A with one A for all layers of a kind
:trap: Sharing A halves the parameters at LoRA's quality; sharing B or both costs quality.
:trap: LoRAFactory shares between all kinds of layer, the authors' code only within one.
:trap: The shared factor sums the gradients of all its layers.
:title: ShareLoRA: Parameter Efficient and Robust Large Language Model Fine-tuning via Shared
    Low-Rank Adaptation
:authors: Yurun Song, Junchen Zhao, Ian G. Harris, Sangeetha Abdu Jyothi
:source: arXiv 2406.10785, 2024: section 3
:verified: authors' code (Rain9876/ShareLoRA, peft_share/tuners/lora/model.py), LoRAFactory and the
    survey arXiv 2601.22708; the paper's text was not to be had
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from loralab.methods import register
from loralab.methods.expansion.lora import plain_pair
from loralab.methods.sharing._shared import cut
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class ShareLoRA(Form):
    """A pair of which one factor, or both, serve many layers.

    Args:
        share: which factors.
        across: "kind" shares between the layers of one kind (the authors' code, by the module's
            name); "model" between all layers, sized by the largest and cut (the survey arXiv
            2601.22708); "start" between layers that the Start puts together (E²LoRA).
    """

    share: Literal["A", "B", "AB"] = "A"
    across: Literal["kind", "model", "start"] = "kind"

    @property
    def shared(self) -> Mapping[str, str]:  # type: ignore[override]
        """The factors named by `share`."""
        return dict.fromkeys(self.share, self.across)

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        return plain_pair(site, evidence)

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return cut(t, site)


register("sharelora", "sharing", __doc__, ShareLoRA())
