"""LoRA-Pro, arXiv 2407.18242: the steps of A and B whose effect on W is closest to the gradient.

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
from typing import ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError, near_misses
from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.recipe import Hyper, Rule, SiteState
from loralab.training.adamw import adamw_step, check_moments, per_slot
from loralab.training.gram import eigen, inverse_gram, others, with_gradients

MOMENTS = ("full", "pair", "none")


@dataclass(frozen=True)
class LoRAPro(Rule):
    """Projected steps for a pair; other tensors of the Form take plain AdamW.

    Args:
        moments: "full" remembers moments of W's size (the paper's AdamW), "pair" gives g^A and g^B
            to AdamW (the lean mode of the authors' code), "none" takes plain gradient steps (the
            paper's SGD).
        x: "sylvester", or "zero" and "symmetry", the paper's other choices of X; X does not change
            the step of B A.
        damping: δ on the Gram matrices that are inverted.
    """

    pair_only: ClassVar[bool] = True
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    inverts: ClassVar[bool] = True

    moments: str = "full"
    x: str = "sylvester"
    damping: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_moments(self)
        for field, known in (("moments", MOMENTS), ("x", ("sylvester", "symmetry", "zero"))):
            if (value := getattr(self, field)) not in known:
                hint = near_misses(value, known) or f"; one of {', '.join(known)}"
                raise UserError(f"unknown {field} {value!r} of LoRA-Pro{hint}")
        if not self.damping > 0:
            raise UserError(f"damping of LoRA-Pro must be positive, not {self.damping!r}")

    def step(self, sites: Sequence[SiteState], hyper: Hyper) -> None:
        adam = []
        for site in sites:
            A, B = self.closest(site, site.g["A"].double(), site.g["B"].double())
            if self.moments == "pair":
                near = {"A": A.to(site.t["A"]), "B": B.to(site.t["B"])}
                adam.append(with_gradients(site, site.g | near))
                continue
            if self.moments == "full":
                A, B = self.adapted(site, A, B, hyper)
            # W itself decays by 1 - lr decay in the paper; W is never touched here, but B A is,
            # each factor by the root.
            kept = (1 - hyper.lr * hyper.weight_decay).clamp_min(0).sqrt()
            for name, g in (("A", A), ("B", B)):
                t = site.t[name]
                moved = t * per_slot(kept, t) - (per_slot(hyper.lr, g) * g).to(t)
                t.copy_(torch.where(per_slot(hyper.lr > 0, t), moved, t))
        adam = adam or others(sites)
        if adam:
            adamw_step(self, adam, hyper, self.beta1, self.beta2, self.eps)

    def closest(self, site: SiteState, g_A: Tensor, g_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return (g^A, g^B) in fp64 from the gradients of A and B."""
        A, B = site.t["A"].double(), site.t["B"].double()
        by_A, by_B = inverse_gram(A.mT, self.damping), inverse_gram(B, self.damping)
        share = per_slot(site.scale.double(), A) ** -2
        g_A, g_B = share * (by_B @ g_A), share * (g_B @ by_A)
        if self.x == "sylvester":
            X = sylvester(B.mT @ B, A @ A.mT, -g_A @ A.mT)
        elif self.x == "symmetry":
            # Half of what both share; the authors' code multiplies by A Aᵀ in place of its inverse.
            X = -0.5 * by_B @ (B.mT @ g_B)
        else:
            X = torch.zeros_like(by_A)
        return g_A + X @ A, g_B - B @ (by_B @ (B.mT @ g_B)) - B @ X

    def adapted(
        self, site: SiteState, g_A: Tensor, g_B: Tensor, hyper: Hyper
    ) -> tuple[Tensor, Tensor]:
        """Return (g^A, g^B) after AdamW's moments of their effect on W."""
        A, B, state = site.t["A"], site.t["B"], site.state
        s = per_slot(site.scale.to(A), A)
        full = torch.cat([B, g_B.to(B)], -1) @ torch.cat([s * g_A.to(A), s * A], -2)
        if "m.W" not in state:
            state["turns"] = torch.zeros_like(hyper.lr)
            state["m.W"], state["v.W"] = torch.zeros_like(full), torch.zeros_like(full)
        state["turns"] += 1
        m = state["m.W"].lerp_(full, 1 - self.beta1)
        v = state["v.W"].mul_(self.beta2).addcmul_(full, full, value=1 - self.beta2)
        turns = state["turns"].double()
        one, two = (per_slot(1 - b**turns, full).to(full) for b in (self.beta1, self.beta2))
        g = m / ((v / two).sqrt_().add_(self.eps).mul_(one))
        return self.closest(site, (s * (B.mT @ g)).double(), (s * (g @ A.mT)).double())


def sylvester(P: Tensor, Q: Tensor, C: Tensor) -> Tensor:
    """Return X with P X + X Q = C for symmetric, positive semi-definite P and Q."""
    (p, U), (q, V) = eigen(P), eigen(Q)
    sums = p.clamp_min(0)[..., :, None] + q.clamp_min(0)[..., None, :]
    return U @ ((U.mT @ C @ V) / sums.clamp_min(torch.finfo(sums.dtype).tiny)) @ V.mT


register("lora_pro", "optimization", __doc__, LoRA(), rule=LoRAPro())
