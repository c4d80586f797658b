"""ALoRA, arXiv 2403.16187: dW = s B diag(α) A, gates α in {0, 1}; ranks move by ablation (AB-LoRA).

IS(r) = S(M) - S(M∖r) + S(M_r): what the model M loses on held-out data without rank r, plus how
well it does with r alone; S is minus the loss here. A round prunes the n_A ranks of least IS and
gives as many new ones to the modules that lost none, those of the highest mean IS first; then
training goes on. A pruned rank is dropped and needs no gate.

The text was not to be had beyond the abstract, the formula (survey arXiv 2601.22708) and summaries:
the numbers and lengths of the rounds are ours. A new rank starts as in LoRA, with B = 0.

:summary: Ranks that an ablation on held-out data finds useless move to other modules
:equation: IS(r) = S(M) - S(M without r) + S(M with r alone); move the n_A ranks of least IS to
    modules that lost none
:trap: A round costs two passes over a held-out batch for every rank of every site.
:trap: The total number of ranks never changes; s = alpha / r keeps the r asked for.
:title: ALoRA: Allocating Low-Rank Adaptation for Fine-tuning Large Language Models
:authors: Zequan Liu, Jiawen Lyn, Wei Zhu, Xing Tian, Yvette Graham
:source: arXiv 2403.16187, 2024: the importance score of AB-LoRA, sections on pruning and allocation
:verified: the survey arXiv 2601.22708 and the abstract; the paper's text was not to be had
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.budgeting._ranks import alive, in_use, regrow
from loralab.methods.expansion.lora import LoRA
from loralab.recipe import Schedule, SiteState


@dataclass(frozen=True)
class ALoRA(Schedule):
    """Train, ablate, move ranks, train on.

    Args:
        rounds: how often ranks move.
        n_moved: n_A, ranks moved per round over all sites; None takes one per site.
        t_initial: fraction of the run before the first round.
        t_final: fraction of the run, at its end, with the final ranks.
    """

    pair_only: ClassVar[bool] = True
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    resizes: ClassVar[bool] = True
    held_out: ClassVar[bool] = True

    rounds: int = 4
    n_moved: int | None = None
    t_initial: float = 0.2
    t_final: float = 0.4

    def __post_init__(self) -> None:
        if self.rounds < 0 or (self.n_moved is not None and self.n_moved < 1):
            raise UserError("rounds and n_moved of ALoRA are counts; n_moved is at least 1")
        if not (self.t_initial >= 0 and self.t_final >= 0 and self.t_initial + self.t_final <= 1):
            raise UserError(
                "t_initial and t_final of ALoRA are fractions of the run whose sum is at most 1, "
                f"not {self.t_initial} and {self.t_final}"
            )

    def is_round(self, step: int, n_steps: int) -> bool:
        """Return whether a round follows 0-based `step`."""
        width = (1 - self.t_initial - self.t_final) / max(self.rounds - 1, 1)
        ends = (round(n_steps * (self.t_initial + i * width)) for i in range(self.rounds))
        return step + 1 < n_steps and step + 1 in ends

    def importance(self, sites: Sequence[SiteState]) -> list[Tensor]:
        """Return IS [K, r] of every site; two held-out losses per rank, for all slots at once."""
        B = [site.t["B"] for site in sites]
        kept = [one.clone() for one in B]
        whole = -sites[0].held_out_loss()
        found = [one.new_zeros(len(one), one.shape[-1]) for one in B]
        for one, old, IS in zip(B, kept, found, strict=True):
            for r in range(IS.shape[-1]):
                one[..., r] = 0
                IS[:, r] = whole + sites[0].held_out_loss()
                one[..., r] = old[..., r]
        for one in B:
            one.zero_()
        for one, old, IS in zip(B, kept, found, strict=True):
            for r in range(IS.shape[-1]):
                one[..., r] = old[..., r]
                IS[:, r] -= sites[0].held_out_loss()
                one[..., r] = 0
        for one, old in zip(B, kept, strict=True):
            one.copy_(old)
        return found

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Move ranks after a stretch of training."""
        if not self.is_round(step, n_steps):
            return
        masks = [alive(site, "B").bool() for site in sites]
        scores = [
            IS.masked_fill(~mask, torch.inf)
            for IS, mask in zip(self.importance(sites), masks, strict=True)
        ]
        keep = [mask.clone() for mask in masks]
        n_new = torch.stack([mask.sum(-1) * 0 for mask in masks])
        for slot in range(n_new.shape[1]):
            pruned, grown = self.choose(sites, [IS[slot] for IS in scores])
            for i, rank in pruned:
                keep[i][slot, rank] = False
            for i in grown:
                n_new[i, slot] += 1
        for site, mask, own, n in zip(sites, masks, keep, n_new, strict=True):
            if bool((mask != own).any() or (n > 0).any()):
                self.fill(site, regrow(site, own, n), step)

    def choose(
        self, sites: Sequence[SiteState], scores: Sequence[Tensor]
    ) -> tuple[list[tuple[int, int]], list[int]]:
        """Return one slot's (site, rank) to prune and as many sites that get a new rank."""
        every = sorted(
            (value, i, r)
            for i, IS in enumerate(scores)
            for r, value in enumerate(IS.tolist())
            if value < math.inf
        )
        n_moved = min(self.n_moved or len(sites), len(every) // 2)
        pruned = [(i, r) for _, i, r in every[:n_moved]]
        lost = [i for i, _ in pruned]
        order, room = [], {}
        for i, (site, IS) in enumerate(zip(sites, scores, strict=True)):
            own = IS[IS.isfinite()]
            mean = float(own.mean()) if len(own) else -math.inf
            order.append((i in lost, -mean, i))
            room[i] = min(site.site.d_in, site.site.d_out) - len(own) + lost.count(i)
        ranked = [i for *_, i in sorted(order)]
        grown: list[int] = []
        while len(grown) < len(pruned):
            able = [i for i in ranked if room[i] > 0]
            able = [i for i in able if i not in lost] or able[:1]
            for i in able[: len(pruned) - len(grown)]:
                grown.append(i)
                room[i] -= 1
        return pruned, grown

    def fill(self, site: SiteState, fresh: Tensor, step: int) -> None:
        """Draw the new rows of A as LoRA does; their columns of B stay 0."""
        A = site.t["A"]
        for slot in range(len(fresh)):
            at = fresh[slot].nonzero().flatten()
            source = site.generator(slot, "alora", step)
            draw = torch.rand(len(at), A.shape[-1], generator=source, dtype=torch.float64)
            A[slot, at] = ((2 * draw - 1) * A.shape[-1] ** -0.5).to(A)

    def ranks(self, sites: Sequence[SiteState]) -> list[Tensor]:
        return in_use(sites, "B")


register("alora", "budgeting", __doc__, LoRA(), schedule=ALoRA())
