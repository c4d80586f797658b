"""ReLoRA, arXiv 2307.05695, section 3: dW = Σ_i s B_i A_i, rank up to the sum of the phases' ranks.

At the end of each phase the update is folded away, A and B start anew, most of the optimizer's
memory of them is dropped and the learning rate warms up again from 0 ("jagged" schedule). The
paper adds s B A into W; here it goes to a frozen low-rank term, and W stays as it is. The paper
pre-trains and begins with some full-rank steps; for fine-tuning there are none.

:summary: Folds the update away and restarts several times, so that ranks add up
:equation: dW = s (B_1 A_1 + ... + B_k A_k), each pair trained after a restart
:trap: Without forgetting the optimizer's memory the new factors walk the old directions.
:trap: Without the re-warm-up a pruned second moment makes the first steps far too large.
:trap: A restart after the last step would be lost; there is none.
:title: ReLoRA: High-Rank Training Through Low-Rank Updates
:authors: Vladislav Lialin, Namrata Shivagunde, Sherin Muckatira, Anna Rumshisky
:source: arXiv 2307.05695, 2023: section 3, algorithm 1
:verified: authors' code (Guitaricet/relora, training_utils.py) and the survey arXiv 2601.22708
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.cola import total_rank
from loralab.methods.expansion.lora import LoRA
from loralab.recipe import Schedule, SiteState


@dataclass(frozen=True)
class ReLoRA(Schedule):
    """Merge and restart.

    Args:
        every: optimizer steps per phase; None spreads `n_restarts` evenly over the run.
        n_restarts: used when `every` is None; 3 to 5 in the survey arXiv 2601.22708.
        warmup: steps of linear re-warm-up after a restart, at most half a phase.
        memory: "prune" keeps the largest entries of each moment of A and B (the paper), of the
            first moment only where the second is kept; "zero" forgets all of the site's memory and
            its step count.
        prune: fraction dropped by magnitude, in [0, 1]; 0.99 in the paper.
    """

    pair_only: ClassVar[bool] = True

    every: int | None = None
    n_restarts: int = 4
    warmup: int = 10
    memory: str = "prune"
    prune: float = 0.99

    def __post_init__(self) -> None:
        if self.every is not None and (not isinstance(self.every, int) or self.every < 1):
            raise UserError(f"every of ReLoRA counts steps, so it is not {self.every!r}")
        if self.n_restarts < 0 or self.warmup < 0:
            raise UserError("n_restarts and warmup of ReLoRA must not be negative")
        if self.memory not in ("prune", "zero"):
            raise UserError(f"memory of ReLoRA is 'prune' or 'zero', not {self.memory!r}")
        if not 0 <= self.prune <= 1:
            raise UserError(f"prune of ReLoRA is a fraction in [0, 1], not {self.prune!r}")

    def phase(self, n_steps: int) -> int:
        """Return the steps per phase."""
        return self.every or max(1, -(-n_steps // (self.n_restarts + 1)))

    def lr_factor(self, step: int, n_steps: int) -> float:
        phase = self.phase(n_steps)
        warmup = min(self.warmup, phase // 2)
        if step < phase or step % phase >= warmup:
            return 1.0
        return (step % phase) / warmup

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        count, rest = divmod(step + 1, self.phase(n_steps))
        if rest or step + 1 >= n_steps:
            return
        for site in sites:
            site.restart(count)
            for name, memory in site.state.items():
                if self.memory == "zero":
                    memory.zero_()
                elif name in ("m.A", "m.B", "v.A", "v.B"):
                    memory.mul_(_largest(memory, 1 - self.prune))
            for m, v in (("m.A", "v.A"), ("m.B", "v.B")):
                one, two = site.state.get(m), site.state.get(v)
                if one is not None and two is not None and one.shape == two.shape:
                    # A first moment without its second would be divided by eps alone.
                    one.mul_(two != 0)

    def ranks(self, sites: Sequence[SiteState]) -> list[Tensor]:
        return [total_rank(site, site.site.rank) for site in sites]


def _largest(x: Tensor, kept: float) -> Tensor:
    """Return a mask of the `kept` fraction of largest |x| within each slot of x [K, ...]."""
    size = x.flatten(1).abs()
    n = round(kept * size.shape[1])
    order = size.argsort(dim=1, descending=True, stable=True)
    mask = size.new_zeros(size.shape).scatter_(1, order[:, :n], 1.0)
    return mask.view_as(x)


register("relora", "expansion", __doc__, LoRA(), schedule=ReLoRA())
