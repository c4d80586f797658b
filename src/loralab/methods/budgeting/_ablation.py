"""A rank's importance by ablation, IS(r) = S(M) - S(M∖r) + S(M_r) (ALoRA, arXiv 2403.16187, eq. 6).

M is the model with all ranks of all modules, M∖r without rank r, M_r with r alone, S the negative
loss on a held-out batch.
"""

from collections.abc import Sequence

from torch import Tensor

from loralab.recipe import SiteState


def ablation(sites: Sequence[SiteState]) -> list[Tensor]:
    """Return IS [K, r] of every site; two held-out losses per rank, for all slots at once."""
    B = [site.t["B"] for site in sites]
    kept = [one.clone() for one in B]
    found = [one.new_zeros(len(one), one.shape[-1]) for one in B]
    whole = -sites[0].held_out_loss()
    for one, old, IS in zip(B, kept, found, strict=True):
        for r in range(IS.shape[-1]):
            one[..., r] = 0
            without = -sites[0].held_out_loss()
            for other in B:
                other.zero_()
            one[..., r] = old[..., r]
            alone = -sites[0].held_out_loss()
            for other, value in zip(B, kept, strict=True):
                other.copy_(value)
            IS[:, r] = whole - without + alone
    return found
