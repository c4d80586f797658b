"""ALoRA: dW = s B diag(α) A, gates α in {0, 1}; ranks move by ablation (AB-LoRA).

A round (algorithm 1) prunes the n_A ranks of least IS (`_ablation.py`) and gives as many new ones
to the modules that lost none, evenly, those of highest mean IS first. The defaults are section
4.3's, as parts of its three epochs: one before the first round, a quarter after each, 8 rounds,
n_A = N_mod. A pruned rank is dropped and needs no gate; a new one starts with B = 0 (ours).

:summary: Ranks that an ablation on held-out data finds useless move to other modules
:equation: IS(r) = S(M) - S(M without r) + S(M with r alone); the n_A ranks of least IS move
:trap: A round costs two passes over a held-out batch for every rank of every site.
:trap: The total falls in a round in which every module loses a rank; s keeps the r asked for.
:title: ALoRA: Allocating Low-Rank Adaptation for Fine-tuning Large Language Models
:authors: Zequan Liu, Jiawen Lyn, Wei Zhu, Xing Tian, Yvette Graham
:source: arXiv 2403.16187, 2024: eq. 6, section 3.4 and algorithm 1 (NAACL 2024)
:verified: the paper's text (a copy of the NAACL version): eq. 6, algorithm 1 and section 4.3
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.bounds import Count, CountOrZero, Share
from loralab.methods import register
from loralab.methods.budgeting import _moves as moves
from loralab.methods.budgeting._ablation import ablation
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

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Move ranks after a stretch of training."""
        if self.is_round(step, n_steps):
            scores = ablation(sites)
            for site, fresh in moves.move(sites, scores, lambda own: self.choose(sites, own)):
                moves.new_pairs(site, fresh, "alora", step)

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

    def ranks(self, sites: Sequence[SiteState]) -> list[Tensor]:
        return in_use(sites, "B")


register("alora", "budgeting", __doc__, LoRA(), schedule=ALoRA())
