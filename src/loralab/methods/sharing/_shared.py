"""What methods with tensors of several layers have in common."""

from dataclasses import dataclass

from torch import Tensor

from loralab.methods.expansion.lora import uniform
from loralab.recipe import Evidence, OwnStart, Site, Tensors


def cut(t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
    """Return B [*, out, r] and A [*, r, in] of this site from a pair made for the largest one."""
    return t["B"][..., : site.d_out, : site.rank], t["A"][..., : site.rank, : site.d_in]


def random_bases(site: Site, evidence: Evidence) -> Tensors:
    """Return U_r [out, r] and V_r [r, in], Kaiming-uniform."""
    r, m, n = site.rank, site.d_out, site.d_in
    return {
        "U_r": uniform(evidence, "U_r", m, r, bound=r**-0.5),
        "V_r": uniform(evidence, "V_r", r, n, bound=n**-0.5),
    }


@dataclass(frozen=True)
class AnchoredStart(OwnStart):
    """The Form's own random start.

    Args:
        anchored: subtract B0 A0, so that step 0 is the base; without that it is off by B0 A0.
    """

    anchored: bool = True
