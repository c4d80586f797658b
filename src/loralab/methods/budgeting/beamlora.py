"""BeamLoRA: y = W0 x + s B diag(s') A x, s' = r softmax(g / τ), ranks as a beam.

Of all modules' ranks sorted by s', those beyond a share p of the total are pruned every Δt steps,
and copies of the best of the same module take their places (top-p and expansion: `_beam.py`). That
p rises, as a cosine from p0 to 1, is our reading; a note on the paper has it fall.

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

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.bounds import Positive
from loralab.methods import register
from loralab.methods.budgeting._beam import TopP
from loralab.methods.expansion.lora import plain_pair
from loralab.recipe import Evidence, Form, Site, SiteState, Tensors


def shares(t: Tensors) -> Tensor:
    """Return s' [*, r], whose mean is 1."""
    return (t["gate"] / t["tau"]).softmax(-1) * t["gate"].shape[-1]


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
class Beam(TopP):
    """Prune and expand by s'."""

    singles_out: ClassVar[frozenset[str]] = frozenset({"A", "B", "gate", "tau"})
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B", "gate"})
    changes: ClassVar[frozenset[str]] = frozenset({"tau"})

    def importance(self, site: SiteState) -> Tensor:
        # Adam's first steps move all gates by nearly the same: rounding must not choose among them.
        return shares(site.t | site.fixed).round(decimals=4)


register("beamlora", "budgeting", __doc__, BeamLoRA(), schedule=Beam())
