"""ReLoRA: at the end of each phase the update is folded away, A and B start anew, most of the
optimizer's memory of them is dropped and the learning rate warms up again from 0 ("jagged").

The paper adds s B A into W; here it goes to a frozen low-rank term. The paper pre-trains, with some
full-rank steps at first; for fine-tuning there are none.

:summary: Folds the update away and restarts several times, so that ranks add up
:equation: dW = s (B_1 A_1 + ... + B_k A_k), each pair trained after a restart
:trap: Without forgetting the optimizer's memory the new factors walk the old directions.
:trap: Without the re-warm-up a pruned second moment makes the first steps far too large.
:trap: A restart after the last step would be lost; there is none.
:title: ReLoRA: High-Rank Training Through Low-Rank Updates
:authors: Vladislav Lialin, Namrata Shivagunde, Sherin Muckatira, Anna Rumshisky
:source: arXiv 2307.05695, 2023: section 3, algorithm 1, figure 2 (the learning rate)
:verified: authors' code (Guitaricet/relora, training_utils.py), a public reading of the paper's
    version 4 and the survey arXiv 2601.22708; the text itself was not to be had
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from loralab.bounds import CountOrZero, Share
from loralab.methods import register
from loralab.methods.expansion._phases import Phases, forget, keep_largest
from loralab.methods.expansion.lora import LoRA
from loralab.recipe import SiteState, Tensors


@dataclass(frozen=True)
class ReLoRA(Phases):
    """Merge and restart.

    Args:
        n_restarts: used when `every` is None; 3 to 5 in the survey arXiv 2601.22708.
        warmup: steps of linear re-warm-up after a restart, at most half a phase; 50 (or 100) in the
            paper, whose phases have 2000 to 5000.
        memory: "prune" keeps the largest entries of each moment of A and B (algorithm 1 prints A
            alone), of the first moment only where the second is kept; "zero" forgets all of the
            site's memory and its step count.
        prune: fraction dropped by magnitude; 0.99 in the paper.
    """

    shortest: ClassVar[int] = 1

    n_restarts: CountOrZero = 4
    warmup: CountOrZero = 50
    memory: Literal["prune", "zero"] = "prune"
    prune: Share = 0.99

    def lr_factor(self, step: int, n_steps: int) -> float:
        phase = self.length(self.n_restarts + 1, n_steps)
        warmup = min(self.warmup, phase // 2)
        if step < phase or step % phase >= warmup:
            return 1.0
        return (step % phase) / warmup

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        if count := self.ended(self.n_restarts + 1, step, n_steps):
            for site in sites:
                site.restart(count)
                if self.memory == "zero":
                    forget(site)
                else:
                    self.thin(site.state)

    def thin(self, state: Tensors) -> None:
        """Keep the largest entries of the moments."""
        for factor in ("A", "B"):
            m, v = state.get(f"m.{factor}"), state.get(f"v.{factor}")
            for memory in (m, v):
                if memory is not None:
                    keep_largest(memory, 1 - self.prune)
            if m is not None and v is not None and m.shape == v.shape:
                # A first moment without its second would be divided by eps alone.
                m.mul_(v != 0)


register("relora", "expansion", __doc__, LoRA(), schedule=ReLoRA())
