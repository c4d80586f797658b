"""RoAd: z = R h for a layer's output h, R of 2 x 2 blocks with α = 1 and θ = 0 at the start:
R_i = [[α_11 cos θ_11, -α_12 sin θ_12], [α_21 sin θ_21, α_22 cos θ_22]]. RoAd1 has one α and θ per
block, RoAd2 one per row, RoAd4 all four (table 1).

:summary: Turns and scales pairs of the layer's outputs
:equation: W' = R W, R of 2 x 2 blocks alpha [[cos t, -sin t], [sin t, cos t]]
:trap: It acts on the output, OFT on the input.
:trap: R turns the bias too, as in PEFT; the paper writes z = R (W x), where no bias stands.
:trap: In RoAd2 and RoAd4 a block is no rotation any more, and R not orthogonal.
:title: 3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability
:authors: Baohao Liao, Christof Monz
:source: arXiv 2409.00119, 2024: eqs. 2 to 4, table 1
:verified: paper (eqs. 2 to 4, table 1); equality with installed PEFT
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from loralab.bounds import Bound
from loralab.core.layers import wide
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.optimization._unscaled import NoAlpha
from loralab.recipe import Evidence, Site, Tensors


@dataclass(frozen=True)
class RoAd(NoAlpha):
    """Scaled rotations of pairs of outputs; the rank has no say, `variant` sets the size.

    Args:
        variant: out, 2 out or 4 out parameters.
        group: outputs j and j + group / 2 of each group form a pair. 2 pairs neighbours, as the
            paper does; PEFT takes 64, for the speed of its kernels.
    """

    any_rank: ClassVar[bool] = True

    variant: Literal[1, 2, 4] = 1
    group: Annotated[int, Bound("an even number", lambda v: v > 0 and v % 2 == 0)] = 2

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return alpha = 1 and theta = 0: [out / 2], [out], or cosine's and sine's [2, out]."""
        m = site.d_out
        if m % self.group:
            raise UserError(f"RoAd's group of {self.group} does not divide the {m} outputs")
        shape = {1: (m // 2,), 2: (m,), 4: (2, m)}[self.variant]
        return {"alpha": evidence.weight.new_ones(shape), "theta": evidence.weight.new_zeros(shape)}

    def outer(self, t: Tensors, y: Tensor, site: Site) -> Tensor:
        # A pair is a complex number h, its block the map h -> p h + q conj(h): one pass over y.
        pairs = wide(y).unflatten(-1, (-1, 2, self.group // 2)).transpose(-2, -1)
        h, (first, second) = torch.view_as_complex(pairs.contiguous()), self.rows(t)
        z = ((first + second) / 2).unsqueeze(-3) * h  # pack axes stand before the rows of y
        if self.variant > 1:
            z = z + ((first - second).conj() / 2).unsqueeze(-3) * h.conj()
        return torch.view_as_real(z).transpose(-2, -1).flatten(-3).to(y.dtype)

    def rows(self, t: Tensors) -> tuple[Tensor, Tensor]:
        """Return α (cos θ + i sin θ) of both rows of every block, [*, groups, group / 2] each."""
        alpha, theta = wide(t["alpha"]), wide(t["theta"])
        if self.variant == 4:
            (a_cos, a_sin), (cos, sin) = alpha.unbind(-2), theta.unbind(-2)
        else:
            a_cos, a_sin, cos, sin = alpha, alpha, theta, theta
        e = torch.complex(a_cos * cos.cos(), a_sin * sin.sin())
        halves = 1 if self.variant == 1 else 2
        e = e.unflatten(-1, (-1, halves, self.group // 2))
        return e[..., 0, :], e[..., -1, :]

    def bias(self, t: Tensors, b: Tensor, site: Site) -> Tensor:
        return self.outer(t, b[None], site).squeeze(-2)


register("road", "optimization", __doc__, RoAd())
