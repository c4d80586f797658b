"""LoRA-Pro: the steps of A and B whose effect on W, s B g^A + s g^B A, is closest to ∇W.

With g_A, g_B the plain gradients (theorems 2.1, 2.3; X keeps both close and moves B A no further):
    g^A = (1/s²) (BᵀB)⁻¹ g_A + X A,    g^B = (1/s²) [I - B (BᵀB)⁻¹ Bᵀ] g_B (AAᵀ)⁻¹ - B X,
    BᵀB X + X AAᵀ = -(1/s²) (BᵀB)⁻¹ g_A Aᵀ.
With AdamW the effect has moments of W's size; what they make of it goes through the same equations.

:summary: Moves A and B so that the step of B A is the one closest to the full gradient
:equation: min |s (B gA + gB A) - G|: gA = (B^T B)^-1 grad A / s^2 + X A, gB likewise
:trap: The paper's AdamW has two moments of W's size per trial; the code's moments='pair' is lean.
:trap: With B = 0 the step of A is 0, not the huge (B^T B)^-1.
:title: LoRA-Pro: Are Low-Rank Adapters Properly Optimized?
:authors: Zhengbo Wang, Jian Liang, Ran He, Zilei Wang, Tieniu Tan
:source: arXiv 2407.18242, 2024: theorems 2.1 and 2.3, algorithms 1 and 2
:verified: authors' code (mrflogs/LoRA-Pro at 2d8f44a), survey, tests; the text was not to be had
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loralab.bounds import Positive
from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.methods.optimization._moments import dense_adam
from loralab.methods.optimization._pairs import PairRule, move, sylvester
from loralab.recipe import Hyper, SiteState, Tensors
from loralab.training.adamw import AdamW, per_slot
from loralab.training.gram import inverse_gram, with_gradients


@dataclass(frozen=True)
class LoRAPro(PairRule):
    """Projected steps.

    Args:
        moments: "full" of W's size, "pair" of g^A and g^B (the default of the authors' code), or
            "none" (the paper's SGD).
        x: how X is chosen; "symmetry" and "zero" are the paper's other choices.
        damping: δ on the Gram matrices that are inverted.
    """

    moments: Literal["full", "pair", "none"] = "full"
    x: Literal["sylvester", "symmetry", "zero"] = "sylvester"
    damping: Positive = 1e-8

    def step(self, sites: Sequence[SiteState], hyper: Hyper) -> None:
        if self.moments == "pair":
            near = [with_gradients(site, site.g | self.closest(site, site.g)) for site in sites]
            AdamW.step(self, near, hyper)
        else:
            super().step(sites, hyper)

    def step_pair(self, site: SiteState, hyper: Hyper) -> None:
        g = self.closest(site, site.g)
        if self.moments == "full":
            g = self.closest(site, dense_adam(self, site, g))
        # W itself decays by 1 - lr decay in the paper; here B A does, each factor by the root.
        kept = (1 - hyper.lr * hyper.weight_decay).clamp_min(0).sqrt()
        for name, near in g.items():
            t = site.t[name]
            move(t, per_slot(kept, t) * t - per_slot(hyper.lr, t) * near, hyper.lr > 0)

    def closest(self, site: SiteState, g: Tensors) -> Tensors:
        """Return g^A and g^B, worked out in fp64, from the gradients g of A and B."""
        A, B = site.t["A"].double(), site.t["B"].double()
        by_A, by_B = inverse_gram(A.mT, self.damping), inverse_gram(B, self.damping)
        s = per_slot(site.scale.double(), A)
        g_A, g_B = by_B @ g["A"].double() / s**2, g["B"].double() @ by_A / s**2
        X = by_A.new_zeros(by_A.shape)
        if self.x == "sylvester":
            X = sylvester(B.mT @ B, A @ A.mT, -g_A @ A.mT)
        elif self.x == "symmetry":
            # Half of what both share; the authors' code multiplies by A Aᵀ in place of its inverse.
            X = -0.5 * by_B @ (B.mT @ g_B)
        near = {"A": g_A + X @ A, "B": g_B - B @ (by_B @ (B.mT @ g_B)) - B @ X}
        return {name: x.to(site.t[name]) for name, x in near.items()}


register("lora_pro", "optimization", __doc__, LoRA(), rule=LoRAPro())
