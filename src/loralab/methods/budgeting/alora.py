"""ALoRA, arXiv 2403.16187: dW = s B diag(α) A, gates α in {0, 1}; ranks move by ablation (AB-LoRA).

IS(r) = S(M) - S(M∖r) + S(M_r) (eq. 6), M the model with all ranks of all modules, M∖r without rank
r, M_r with r alone, S the negative loss on a held-out batch. A round (algorithm 1) prunes the n_A
ranks of least IS and gives as many new ones to the modules that lost none, evenly, those of highest
mean IS first; then training goes on. A pruned rank is dropped and needs no gate.

The defaults are section 4.3's, as parts of its three epochs: one before the first round, a quarter
after each, 8 rounds, n_A = N_mod. A new rank starts as in LoRA, with B = 0 (ours).

:summary: Ranks that an ablation on held-out data finds useless move to other modules
:equation: IS(r) = S(M) - S(M without r) + S(M with r alone); move the n_A ranks of least IS to
    modules that lost none
:trap: A round costs two passes over a held-out batch for every rank of every site.
:trap: The total number of ranks falls in a round in which every module loses one: nothing is added
    then; s = alpha / r keeps the r asked for.
:title: ALoRA: Allocating Low-Rank Adaptation for Fine-tuning Large Language Models
:authors: Zequan Liu, Jiawen Lyn, Wei Zhu, Xing Tian, Yvette Graham
:source: arXiv 2403.16187, 2024: eq. 6, section 3.4 and algorithm 1 (NAACL 2024)
:verified: the paper's text (a copy of the NAACL version): eq. 6, algorithm 1 and section 4.3
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import Count, CountOrZero, Share
from loralab.methods import register
from loralab.methods.budgeting import _moves as moves
from loralab.methods.budgeting._ranks import Window, in_use
from loralab.methods.expansion.lora import LoRA
from loralab.recipe import SiteState


@dataclass(frozen=True)
class ALoRA(Window):
    """Train, ablate, move ranks, train on.

    Args:
        rounds: how often ranks move.
        n_moved: n_A, ranks moved per round over all sites; None takes N_mod, one block's sites.
    """

    pair_only: ClassVar[bool] = True
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    resizes: ClassVar[bool] = True
    held_out: ClassVar[bool] = True

    t_initial: Share = 1 / 3
    t_final: Share = 1 / 12
    rounds: CountOrZero = 8
    n_moved: Count | None = None

    def is_round(self, step: int, n_steps: int) -> bool:
        """Return whether a round follows 0-based `step`."""
        width = (1 - self.t_initial - self.t_final) / max(self.rounds - 1, 1)
        ends = (round(n_steps * (self.t_initial + i * width)) for i in range(self.rounds))
        return step + 1 < n_steps and step + 1 in ends

    def importance(self, sites: Sequence[SiteState]) -> list[Tensor]:
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

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Move ranks after a stretch of training."""
        if self.is_round(step, n_steps):
            scores = self.importance(sites)
            for site, fresh in moves.move(sites, scores, lambda own: self.choose(sites, own)):
                self.fill(site, fresh, step)

    def choose(self, sites: Sequence[SiteState], scores: Sequence[Tensor]) -> moves.Moves:
        """Return one slot's (site, rank) to prune and the sites that get a new rank each."""
        n_moved = self.n_moved or round(len(sites) / len({site.site.layer for site in sites}))
        every = moves.lowest_first(scores)
        pruned = every[: min(n_moved, len(every) // 2)]
        lost = {i for i, _ in pruned}
        others = [i for i in range(len(sites)) if i not in lost]
        others.sort(key=lambda i: moves.mean(scores[i]), reverse=True)
        rooms = {i: moves.room(sites[i], scores[i]) for i in others}
        return pruned, moves.shared_evenly(len(pruned), rooms)

    def fill(self, site: SiteState, fresh: Tensor, step: int) -> None:
        """Draw the new rows of A as LoRA does; their columns of B stay 0."""
        A = site.t["A"]
        for slot, new, source in moves.new_ranks(site, fresh, "alora", step):
            draw = torch.rand(len(new), A.shape[-1], generator=source, dtype=torch.float64)
            A[slot, new] = ((2 * draw - 1) * A.shape[-1] ** -0.5).to(A)

    def ranks(self, sites: Sequence[SiteState]) -> list[Tensor]:
        return in_use(sites, "B")


register("alora", "budgeting", __doc__, LoRA(), schedule=ALoRA())
