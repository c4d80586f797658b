"""SD-LoRA, arXiv 2501.13198, eq. 4: h' = (W0 + Σ_k α_k A_k B_k / ‖A_k B_k‖_F) x.

One direction per task k, frozen when the task is over, and a magnitude α_k that goes on being
trained. (The paper writes A B for our B A.) The present direction is not normalised while it is
trained, as in the authors' code: with B = 0 it has no norm, and step 0 is the base. When the task
ends, α_t takes the norm over, so that the function stays. The paper shares the magnitudes among
layers; here each layer has its own, since the norms differ. Its variants with falling ranks and
with absorbed directions are not offered.

:summary: Continual learning: frozen directions of earlier tasks, magnitudes still trained
:equation: dW = s (alpha_1 B_1 A_1 / |B_1 A_1|_F + ... + alpha_t B_t A_t)
:trap: n_tasks must be the length of the sequence; on one task it is LoRA with a trained factor.
:trap: The old magnitudes go on being trained, the old directions never are.
:trap: The authors' code divides by |B|_F |A|_F, which is larger than the paper's |B A|_F.
:title: SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning
:authors: Yichen Wu, Hongming Piao, Long-Kai Huang, Renzhen Wang, Wanhua Li, Hanspeter Pfister, Deyu
    Meng, Kede Ma, Ying Wei
:source: arXiv 2501.13198, 2025: eq. 4, algorithm 1
:verified: authors' code (backbone/lora.py in a copy of WuYichen-97/SD-Lora-CL) and a detailed
    public summary; the paper's text was not to be had
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.cola import forget
from loralab.methods.expansion.lora import check_scaling, plain_pair, scale_of
from loralab.recipe import Evidence, Form, Schedule, Site, SiteState, Tensors


@dataclass(frozen=True)
class Directions(Form):
    """The present pair with its magnitude, and the frozen directions of the tasks before.

    Args:
        n_tasks: how many tasks there will be; all directions are there from the start.
        scaling: as in LoRA.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "alpha", "A_old", "B_old", "alpha_old"})
    frozen: ClassVar[frozenset[str]] = frozenset({"A_old", "B_old"})

    n_tasks: int = 1
    scaling: str = "alpha/r"

    def __post_init__(self) -> None:
        check_scaling(self.scaling)
        if self.n_tasks < 1:
            raise UserError(f"SD-LoRA needs at least one task, not {self.n_tasks}")

    def scale(self, alpha: float, rank: int) -> float:
        return scale_of(self.scaling, alpha, rank)

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A, B and alpha [1] = 1, and room for the directions of n_tasks - 1 tasks."""
        t = plain_pair(site, evidence)
        t["alpha"] = evidence.weight.new_ones(1)  # 0.8 in the authors' code
        if self.n_tasks > 1:
            n, r = self.n_tasks - 1, site.rank
            t["A_old"] = evidence.weight.new_zeros(n * r, site.d_in)
            t["B_old"] = evidence.weight.new_zeros(site.d_out, n * r)
            t["alpha_old"] = evidence.weight.new_ones(n)
        return t

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        B, A = t["alpha"].unsqueeze(-1) * t["B"], t["A"]
        if "A_old" not in t:
            return B, A
        alpha = t["alpha_old"].repeat_interleave(A.shape[-2], -1).unsqueeze(-2)
        return torch.cat([B, alpha * t["B_old"]], -1), torch.cat([A, t["A_old"]], -2)


@dataclass(frozen=True)
class NextDirection(Schedule):
    """Freeze the present direction and begin another one.

    Args:
        restart_magnitudes: all of them begin each task at 1, as the authors' code restarts them;
            the function then jumps at the border of two tasks.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"A_old", "B_old", "alpha_old", "alpha"})
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B", "alpha"})
    changes: ClassVar[frozenset[str]] = frozenset({"A_old", "B_old"})

    restart_magnitudes: bool = False

    @torch.no_grad()
    def next_task(self, sites: Sequence[SiteState], count: int) -> None:
        """Normalise the direction of task `count` - 1 into its place among the old ones.

        Raises:
            UserError: there are more tasks than the Form has room for.
        """
        n = sites[0].t["alpha_old"].shape[-1] if "alpha_old" in sites[0].t else 0
        if count > n:
            raise UserError(
                f"SD-LoRA was made for n_tasks = {n + 1} and cannot begin task {count + 1}; set "
                "n_tasks to the length of the sequence"
            )
        for site in sites:
            A, B, alpha, old = site.t["A"], site.t["B"], site.t["alpha"], site.t["alpha_old"]
            r = A.shape[-2]
            here = slice((count - 1) * r, count * r)
            norm = _product_norm(B, A)
            site.fixed["A_old"][..., here, :] = A
            site.fixed["B_old"][..., here] = B / norm.clamp_min(torch.finfo(B.dtype).tiny)
            old[..., count - 1] = (alpha * norm[..., 0])[..., 0]
            if self.restart_magnitudes:
                old.fill_(1.0)
            alpha.fill_(1.0)
            B.zero_()
            for slot, values in enumerate(A):
                generator = site.generator(slot, "A", count)
                draw = torch.rand(values.shape, generator=generator, dtype=torch.float64)
                values.copy_((2 * draw - 1) * site.site.d_in**-0.5)
            forget(site)


def _product_norm(B: Tensor, A: Tensor) -> Tensor:
    """Return ‖B A‖_F [K, 1, 1] of B [K, m, r] and A [K, r, n], without the product."""
    return ((B.mT @ B) * (A @ A.mT)).sum((-2, -1), keepdim=True).clamp_min(0).sqrt()


register("sd_lora", "optimization", __doc__, Directions(), schedule=NextDirection())
