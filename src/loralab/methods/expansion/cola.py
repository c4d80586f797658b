"""COLA (Chain of LoRA), arXiv 2401.04151, section 4: W = W0 + Σ_i s B_i A_i, link by link.

Each link is tuned, its update is tied to the frozen part, and a new pair with a new optimizer goes
on from there, as Frank-Wolfe's steps do. The paper merges into W; here the sum is the adapter's own
frozen low-rank term. Its ablation with smaller ranks for later links is not offered.

:summary: Trains a chain of pairs, each on what the ones before it left over
:equation: dW = s (B_1 A_1 + ... + B_k A_k), pair i trained in link i
:trap: The optimizer begins again with each link; its first Adam steps have full size.
:trap: With one link it is LoRA.
:title: Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning
:authors: Wenhan Xia, Chengwei Qin, Elad Hazan
:source: arXiv 2401.04151, 2024: section 4, algorithm 1
:verified: the abstract and the survey arXiv 2601.22708; the paper's text was not to be had, so the
    default length of the chain is ours
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.recipe import Schedule, SiteState


def check_phases(piece: Any, phases: str) -> None:
    """Raise UserError unless the piece's `every` and its field `phases` can count something."""
    name, every, n = type(piece).__name__, piece.every, getattr(piece, phases)
    if every is not None and (not isinstance(every, int) or every < 1):
        raise UserError(f"every of {name} counts steps, so it is not {every!r}")
    if n < 1:
        raise UserError(f"{phases} of {name} must be at least 1, not {n}")


def phase_ended(every: int | None, n_phases: int, step: int, n_steps: int) -> int:
    """Return how many phases are over if one ends with 0-based `step` and another follows, or 0.

    A phase lasts `every` steps; with None the run is cut into `n_phases`, of two steps at least:
    after a single one the next phase would know nothing of the last.
    """
    count, rest = divmod(step + 1, every or max(2, -(-n_steps // n_phases)))
    return 0 if rest or step + 1 >= n_steps else count


def forget(site: SiteState) -> None:
    """Empty the optimizer's memory of the site, its step count included."""
    for memory in site.state.values():
        memory.zero_()


def total_rank(site: SiteState, present: Tensor | int) -> Tensor:
    """Return the rank [K] that the folded updates and a `present` one can have together."""
    return (site.n_folded + present).clamp(max=min(site.site.d_in, site.site.d_out)).long()


@dataclass(frozen=True)
class Chain(Schedule):
    """Fold and start anew with an empty optimizer.

    Args:
        every: optimizer steps per link; None cuts the run into `n_links` equal ones.
        n_links: length of the chain, used when `every` is None; the number is ours.
    """

    pair_only: ClassVar[bool] = True

    every: int | None = None
    n_links: int = 3

    def __post_init__(self) -> None:
        check_phases(self, "n_links")

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        count = phase_ended(self.every, self.n_links, step, n_steps)
        if not count:
            return
        for site in sites:
            site.restart(count)
            forget(site)

    def ranks(self, sites: Sequence[SiteState]) -> list[Tensor]:
        return [total_rank(site, site.site.rank) for site in sites]


register("cola", "expansion", __doc__, LoRA(), schedule=Chain())
