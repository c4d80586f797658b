"""BeamLoRA, arXiv 2502.13604: y = W0 x + s B diag(s') A x, s' = r softmax(g / τ), ranks as a beam.

The importance of a rank is its learned s'. Every Δt steps all ranks of all modules are sorted by
it; those beyond a share p of the total (top-p) are pruned, and as many of the most important ranks
of the same module are expanded into their places: the pruned rank takes the parent's A and B, and
their moments, of half a period ago, and both take the mean of their gates. p rises as a cosine from
p0 to 1, where pruning ends.

From the authors' code and a note on the paper. The direction of the cosine is our reading (another
note has p fall). There the moments' copies are written to a temporary and lost; here they arrive.
At most half of a module's ranks are pruned at once (ours).

:summary: Weak ranks of a module give their place to copies of its strong ones
:equation: dW = s B diag(r softmax(g / tau)) A; ranks beyond the top-p share become copies
:trap: The number of ranks never changes; what changes is what they hold.
:trap: A copy of the present parameters would stay equal to its parent for ever; the copy is of half
    a period ago.
:trap: tau = 0.05 makes the gates learn twenty times faster than the learning rate says.
:title: BeamLoRA: Beam-Constraint Low-Rank Adaptation
:authors: Naibin Gu, Zhenyu Zhang, Xiyu Liu, Peng Fu, Zheng Lin, Shuohuan Wang, Yu Sun, Hua Wu,
    Weiping Wang, Haifeng Wang
:source: arXiv 2502.13604, 2025: assessment, pruning and expansion, dynamic top-p of the method's
    section
:verified: authors' code (gccnlp/BeamLoRA: train.py, its script and its peft); its scheduler's file
    and the paper's text were not to be had
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import Positive, SomeShare
from loralab.methods import register
from loralab.methods.budgeting._moves import beyond, ranked, recall, remember
from loralab.methods.expansion.lora import plain_pair
from loralab.recipe import Evidence, Form, Schedule, Site, SiteState, Tensors


def shares(t: Tensors) -> Tensor:
    """Return s' [*, r], whose mean is 1."""
    return (t["gate"] / t["tau"]).softmax(-1) * t["gate"].shape[-1]


def importance(site: SiteState) -> Tensor:
    """Return s' [K, r] to compare ranks by."""
    # Adam's first steps move all gates by nearly the same: rounding must not choose among them.
    return shares(site.t | site.fixed).round(decimals=4)


@dataclass(frozen=True)
class BeamLoRA(Form):
    """LoRA whose ranks compete.

    Args:
        tau: temperature; 0.05 in the authors' code, 0.03 for learning rates below 1e-4.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "gate", "tau"})
    frozen: ClassVar[frozenset[str]] = frozenset({"tau"})  # a tensor, so that Beam sees it too

    tau: Positive = 0.05

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return LoRA's A and B = 0, gate [r] = 0, so that all s' are 1, and tau [1]."""
        W = evidence.weight
        own = {"gate": W.new_zeros(site.rank), "tau": W.new_full((1,), self.tau)}
        return plain_pair(site, evidence) | own

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return t["B"], shares(t).unsqueeze(-1) * t["A"]


@dataclass(frozen=True)
class Beam(Schedule):
    """Prune and expand within each module.

    Args:
        interval: Δt as a fraction of the run, at least two steps.
        p: p0, the share of the total importance that stays at first.
        until: fraction of the run at which p has reached 1.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"A", "B", "gate", "tau"})
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B", "gate"})
    changes: ClassVar[frozenset[str]] = frozenset({"tau"})

    interval: SomeShare = 0.08
    p: SomeShare = 0.95
    until: SomeShare = 2 / 3

    def threshold(self, step: int, n_steps: int) -> float:
        """Return p after 0-based `step`."""
        done = min(1.0, (step + 1) / (self.until * n_steps))
        return 1 - (1 - self.p) * (1 + math.cos(math.pi * done)) / 2

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Remember the parents at half a period; prune and expand at its end, but not the last."""
        t, every = step + 1, max(2, round(self.interval * n_steps))
        if t % every == every // 2:
            for site in sites:
                remember(site)
        elif t % every == 0 and n_steps - t >= every and "was.A" in sites[0].state:
            for site, weak in zip(sites, self.weak(sites, step, n_steps), strict=True):
                self.expand(site, weak, step)

    def weak(self, sites: Sequence[SiteState], step: int, n_steps: int) -> list[Tensor]:
        """Return masks [K, r] of the ranks to prune: beyond the share p, half of a module's."""
        return beyond([importance(site) for site in sites], self.threshold(step, n_steps))

    def expand(self, site: SiteState, weak: Tensor, step: int) -> None:
        """Put the strongest ranks' past in the places of the weak ones, in random order."""
        gate, order = site.t["gate"], ranked(importance(site))
        for slot in range(len(weak)):
            places = weak[slot].nonzero().flatten()
            mix = torch.randperm(len(places), generator=site.generator(slot, "beam", step))
            parents = order[slot, mix.to(order.device)]
            recall(site, slot, places, parents)
            # A parent has one child, so the mean of the two gates is each one's new gate.
            mean = (gate[slot, places] + gate[slot, parents]) / 2
            gate[slot, places], gate[slot, parents] = mean, mean
        for name in {"m.gate", "v.gate"} & site.state.keys():
            site.state[name].zero_()


register("beamlora", "budgeting", __doc__, BeamLoRA(), schedule=Beam())
