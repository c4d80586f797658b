"""Flora: momentum compressed by a random A [r, in], which is drawn anew every κ steps.

LoRA with a frozen A takes just the gradient that is needed, ∂L/∂B = s G Aᵀ, and steps of B move W
by multiples of M A. So G is never formed: B is trained, and at each new draw B A is folded into the
adapter's own frozen low-rank term, while W stays, and M ← M A_old A_newᵀ. Ours is the form with a
single scale per matrix, the root mean square of M A, in the place of Adafactor's second moments;
those need the dense G.

:summary: Momentum compressed by a random projection that is drawn anew now and then
:equation: W <- W - lr M A / rms(M A), M <- beta M + (1 - beta) G A^T, A ~ N(0, 1/r)
:trap: Each new projection adds r ranks to the frozen term; one projection alone has rank r.
:trap: Without M A_old A_new^T the momentum of the old basis is noise in the new one.
:trap: The step is in W, so a scale s other than 1 multiplies it; keep alpha = r.
:trap: The authors' code also adds the uncompressed gradient to each step, for which it has to be
    dense, compresses the shorter side of W, not always the input's, and multiplies the rate by the
    root mean square of W, at least 1e-3.
:title: Flora: Low-Rank Adapters Are Secretly Gradient Compressors
:authors: Yongchang Hao, Yanshuai Cao, Lili Mou
:source: arXiv 2402.03293, 2024: algorithm 2
:verified: authors' code (BorealisAI/flora-opt) for draw, transfer, β and κ, and the abstract; the
    paper's text was not to be had
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from loralab.bounds import Decay, Positive
from loralab.methods import register
from loralab.methods.expansion.rac_lora import Asymmetric
from loralab.methods.optimization._pairs import product_norm
from loralab.methods.optimization._resampling import Resampling
from loralab.recipe import Hyper, Rule, SiteState
from loralab.training.adamw import per_slot


@dataclass(frozen=True)
class Compressed(Rule):
    """Momentum in the space of B; A is the projection.

    Args:
        beta1: β; 0.9 in the authors' configuration.
        normalise: divide a step by the root mean square of M A, so that the rate is that of W's
            entries; False takes the algorithm's bare step.
        eps: smallest root mean square.
    """

    pair_only: ClassVar[bool] = True

    beta1: Decay = 0.9
    normalise: bool = True
    eps: Positive = 1e-30

    def trains(self, name: str) -> bool:
        return name != "A"

    def step(self, sites: Sequence[SiteState], hyper: Hyper) -> None:
        for site in sites:
            for name, tensor in site.t.items():
                m = site.state.setdefault("m." + name, torch.zeros_like(tensor))
                m.lerp_(site.g[name], 1 - self.beta1)
                rate = per_slot(hyper.lr, tensor)
                if self.normalise:
                    rms = m.flatten(1).square().mean(1).sqrt()
                    if name == "B":
                        A = site.fixed["A"]
                        rms = product_norm(m, A) / (m.shape[-2] * A.shape[-1]) ** 0.5
                    rate = rate / per_slot(rms.clamp_min(self.eps), tensor)
                decay = per_slot(1 - hyper.lr * hyper.weight_decay, tensor)
                tensor.mul_(decay).sub_(rate * m)


FORM = Asymmetric(distribution="projection")

register("flora_compress", "optimization", __doc__, FORM, rule=Compressed(), schedule=Resampling())
