"""LoRA-Pro: the steps of A and B whose effect on W is closest to the full gradient.

With g_A and g_B the plain gradients, s B g^A + s g^B A is closest to ∇W (theorem 2.1) for

    g^A = (1/s²) (BᵀB)⁻¹ g_A + X A,    g^B = (1/s²) [I - B (BᵀB)⁻¹ Bᵀ] g_B (AAᵀ)⁻¹ - B X,
    BᵀB X + X AAᵀ = -(1/s²) (BᵀB)⁻¹ g_A Aᵀ    (theorem 2.3: X keeps both close to g_A and g_B).

With AdamW the effect g̃ on W has moments of W's size, g̃ ← m̂ / (√v̂ + ϵ), and is brought back by the
same equations with g_A = s Bᵀg̃ and g_B = s g̃ Aᵀ.

:summary: Moves A and B so that the step of B A is the one closest to the full gradient
:equation: min |s (B gA + gB A) - G|: gA = (B^T B)^-1 grad A / s^2 + X A, gB likewise
:trap: The paper's AdamW keeps two moments of W's size for every trial; moments='pair' is as lean as
    LoRA and is what the authors' code runs by default.
:trap: The scale enters squared: 1/s^2 before both gradients.
:trap: X changes A and B but not the step of B A.
:trap: With B = 0 the step of A is 0, not the huge (B^T B)^-1.
:title: LoRA-Pro: Are Low-Rank Adapters Properly Optimized?
:authors: Zhengbo Wang, Jian Liang, Ran He, Zilei Wang, Tieniu Tan
:source: arXiv 2407.18242, 2024: theorems 2.1 and 2.3, algorithms 1 and 2
:verified: authors' code (mrflogs/LoRA-Pro, peta/optim.py at 2d8f44a) and the survey arXiv
    2601.22708; a test proves the step closest to the full gradient
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from loralab.bounds import Positive
from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.methods.optimization._pairs import PairRule, move, sylvester
from loralab.recipe import Hyper, SiteState, Tensors
from loralab.training.adamw import AdamW, per_slot
from loralab.training.gram import inverse_gram, with_gradients


@dataclass(frozen=True)
class LoRAPro(PairRule):
    """Projected steps.

    Args:
        moments: "full" remembers moments of W's size (the paper's AdamW), "pair" gives g^A and g^B
            to AdamW (the lean mode of the authors' code), "none" takes plain gradient steps (the
            paper's SGD).
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

    def memory(self, site: SiteState) -> Tensors:
        if self.moments == "none":
            return {}
        zero = torch.zeros_like(site.t["B"] @ site.t["A"])
        return {"m.W": zero, "v.W": zero.clone()}

    def step_pair(self, site: SiteState, hyper: Hyper) -> None:
        g = self.closest(site, site.g)
        if self.moments == "full":
            g = self.closest(site, self.adapted(site, g))
        # W itself decays by 1 - lr decay in the paper; W is never touched here, but B A is, each
        # factor by the root.
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
        X = torch.zeros_like(by_A)
        if self.x == "sylvester":
            X = sylvester(B.mT @ B, A @ A.mT, -g_A @ A.mT)
        elif self.x == "symmetry":
            # Half of what both share; the authors' code multiplies by A Aᵀ in place of its inverse.
            X = -0.5 * by_B @ (B.mT @ g_B)
        near = {"A": g_A + X @ A, "B": g_B - B @ (by_B @ (B.mT @ g_B)) - B @ X}
        return {name: x.to(site.t[name]) for name, x in near.items()}

    def adapted(self, site: SiteState, g: Tensors) -> Tensors:
        """Return what AdamW makes of the effect of g^A and g^B on W, as gradients of A and B."""
        A, B, state = site.t["A"], site.t["B"], site.state
        s = per_slot(site.scale.to(A), A)
        effect = torch.cat([B, g["B"]], -1) @ torch.cat([s * g["A"], s * A], -2)  # s (B gA + gB A)
        m = state["m.W"].lerp_(effect, 1 - self.beta1)
        v = state["v.W"].mul_(self.beta2).addcmul_(effect, effect, value=1 - self.beta2)
        turns = state["turns"].double()
        one, two = (per_slot(1 - b**turns, m).to(m) for b in (self.beta1, self.beta2))
        adam = m / (v / two).sqrt_().add_(self.eps).mul_(one)
        return {"A": s * (B.mT @ adam), "B": s * (adam @ A.mT)}


register("lora_pro", "optimization", __doc__, LoRA(), rule=LoRAPro())
