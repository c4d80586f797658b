"""PRILoRA: LoRA whose rank grows linearly with depth and whose A is pruned while it trains.

r_l = r_s + (r_f - r_s) l / (L - 1) for layer l of L. Every so many steps the share p of the entries
of A with the least |A_ij| ‖x_j‖ is set to 0 (Wanda's importance, arXiv 2306.11695).

:summary: Ranks grow with depth, and the unimportant half of A is pruned as it trains
:equation: r_l from r/2 at the first layer to 3r/2 at the last; A_ij = 0 where |A_ij| |x_j| is least
:trap: Pruning sets entries to 0 and lets them train on, so that they may grow back; it is no mask.
:trap: Entries compete within a row of A, as in Wanda, not over the matrix.
:trap: The inputs' sizes are those at the base, since a Schedule sees no inputs; the paper averages
    them while it trains.
:trap: The mean rank is the one asked for only if every depth has as many layers.
:title: PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation
:authors: Nadav Benedek, Lior Wolf
:source: arXiv 2401.11316, 2024: section 3
:verified: the abstract and a public review (Moonlight) for the ranks; the text and the authors'
    code could not be had, so 4 to 12, 40 steps and one half are from memory
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from loralab.bounds import Count, PartShare, Positive
from loralab.methods import register
from loralab.methods.budgeting._evidence import PairAndInputs
from loralab.recipe import Look, OwnStart, Schedule, Site, SiteState


@dataclass(frozen=True)
class RisingRanks(OwnStart):
    """Ranks that grow linearly with depth; the tensors are the Form's own.

    Args:
        first, last: r_s and r_f in units of the rank asked for; 4 and 12 at 8 in the paper.
    """

    first: Positive = 0.5
    last: Positive = 1.5

    def ranks(self, sites: Sequence[Site], evidence: Look) -> dict[str, int] | None:
        ranks = {}
        for s in sites:
            depth = s.layer / (s.n_layers - 1) if s.n_layers > 1 else 0.5
            rank = round((s.asked or s.rank) * (self.first + (self.last - self.first) * depth))
            ranks[s.name] = min(max(1, rank), s.d_in, s.d_out)
        return ranks


@dataclass(frozen=True)
class PruneA(Schedule):
    """Set the least important entries of A to 0, again and again.

    Args:
        every: steps between two prunings; a quarter of the run in shorter runs.
        share: p, the share of each row of A that is set to 0.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"A", "x"})
    trained: ClassVar[frozenset[str]] = frozenset({"A"})

    every: Count = 40
    share: PartShare = 0.5

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        if (step + 1) % min(self.every, max(1, n_steps // 4)):
            return
        for site in sites:
            A = site.t["A"]
            importance = A.abs() * site.fixed["x"].unsqueeze(-2)
            n_pruned = int(self.share * A.shape[-1])
            least = importance.topk(n_pruned, dim=-1, largest=False).indices
            A.scatter_(-1, least, torch.zeros_like(least, dtype=A.dtype))


register("prilora", "budgeting", __doc__, PairAndInputs(), start=RisingRanks(), schedule=PruneA())
