"""(IA)³: softmax(Q (l_k ∘ Kᵀ) / √d_k) (l_v ∘ V) and (l_ff ∘ γ(W1 x)) W2, with l = 1 at the start.

Keys and values are outputs of their layers, l ∘ (W x + b); l_ff scales the input of the second
feed-forward layer. The paper adapts keys, values and that layer only: choose targets accordingly.

:summary: Rescales keys, values and feed-forward activations by learned factors
:equation: W' = diag(l) W, or W diag(l) in the last feed-forward layer, l0 = 1
:trap: In the feed-forward block l scales the input of the second layer, not its output.
:trap: Where the output is scaled, so is the bias, as in the authors' code; T0 has none.
:trap: A handful of parameters per layer: the best learning rate is far above LoRA's.
:title: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning
:authors: Haokun Liu, Derek Tam, Mohammed Muqeeth, Jay Mohta, Tenghao Huang, Mohit Bansal, Colin
    Raffel
:source: arXiv 2205.05638, 2022: section 3.3
:verified: paper and authors' code (r-three/t-few, src/models/lora.py); equality with installed PEFT
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.methods import register
from loralab.methods.optimization._unscaled import Unscaled
from loralab.recipe import Evidence, Site, Tensors


@dataclass(frozen=True)
class IA3(Unscaled):
    """A learned factor per output, or per input of a feed-forward layer; the rank has no say.

    Args:
        feedforward: comma-separated ends of the names of layers whose input is scaled: the last
            layer of the feed-forward block in the model families that PEFT lists.
    """

    any_rank: ClassVar[bool] = True

    feedforward: str = "down_proj, fc2, wo, w2, fc_out, dense_4h_to_h, mlp.c_proj, output.dense"

    def scales_input(self, site: Site) -> bool:
        """Return whether l belongs to the site's input."""
        ends = [end.strip() for end in self.feedforward.split(",") if end.strip()]
        return any(f".{site.name}".endswith(f".{end}") for end in ends)

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return l = 1, [in] for a feed-forward layer and [out] for others."""
        size = site.d_in if self.scales_input(site) else site.d_out
        return {"l": evidence.weight.new_ones(size)}

    def inner(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        return (x * t["l"].unsqueeze(-2)).to(x.dtype) if self.scales_input(site) else x

    def outer(self, t: Tensors, y: Tensor, site: Site) -> Tensor:
        return y if self.scales_input(site) else (y * t["l"].unsqueeze(-2)).to(y.dtype)

    def bias(self, t: Tensors, b: Tensor, site: Site) -> Tensor:
        return b if self.scales_input(site) else b * t["l"]


register("ia3", "optimization", __doc__, IA3())
