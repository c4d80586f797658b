"""The frozen bases U_r and V_r of LoRA-XS and TinyLoRA: random, or r singular triplets of W."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from loralab.bounds import CountOrZero
from loralab.errors import UserError
from loralab.methods.expansion.lora import uniform
from loralab.methods.initialization._svd import fast_svd
from loralab.recipe import Evidence, Site, Start, Tensors


def random_bases(site: Site, evidence: Evidence) -> Tensors:
    """Return U_r [out, r] and V_r [r, in], Kaiming-uniform."""
    r, m, n = site.rank, site.d_out, site.d_in
    return {
        "U_r": uniform(evidence, "U_r", m, r, bound=r**-0.5),
        "V_r": uniform(evidence, "V_r", r, n, bound=n**-0.5),
    }


@dataclass(frozen=True)
class SVDBases(Start):
    """Bases from r singular triplets of W.

    Args:
        sigma_side: where Σ_r goes: "in" with V_r, "out" with U_r, "both" half each.
        part: "top" or, the paper's ablation, "bottom" triplets.
        niter: power iterations of the fast SVD (10 in the authors' first code); None is exact.
    """

    pair_only: ClassVar[bool] = False
    singles_out: ClassVar[frozenset[str]] = frozenset({"U_r", "V_r"})

    sigma_side: Literal["in", "out", "both"] = "in"
    part: Literal["top", "bottom"] = "top"
    niter: CountOrZero | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.niter is not None and self.part == "bottom":
            raise UserError("the fast SVD finds top triplets only: part = 'bottom' takes no niter")

    @property
    def seeded(self) -> bool:  # type: ignore[override]
        """The exact SVD draws nothing."""
        return self.niter is not None

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        if self.niter is None:
            U, S, Vh = torch.linalg.svd(evidence.weight, full_matrices=False)
            keep = slice(site.rank) if self.part == "top" else slice(len(S) - site.rank, None)
            U, S, Vh = U[:, keep], S[keep], Vh[keep]
        else:
            U, S, Vh = fast_svd(
                evidence.weight, site.rank, self.niter, evidence.generator("sketch")
            )
        power = {"in": 0.0, "both": 0.5, "out": 1.0}[self.sigma_side]
        return {"U_r": U * S**power, "V_r": (S ** (1 - power))[:, None] * Vh}
