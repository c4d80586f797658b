"""E²LoRA, ICLR 2026 (OpenReview IQttyo0460; not on arXiv): the layers l of a sharing interval have
one pair, dW_l = s B_I A_I. Intervals and their ranks come from the gradients G_l at the base.

Proxy entropy H(G) = log σ_G + ½ log 2π + ½, σ_G the spread of G's entries; I(G_i; G_j) = H(G_i) +
H(G_j) - H(G_i, G_j), of both together; RMI = I / min(H(G_i), H(G_j)). An interval grows from its
first layer m while RMI(m, l) >= τ_m, the mean of RMI(m, k) over the other k. Its entropy is its
layers' largest, and the ranks share out N r in proportion to it. From a detailed note on the paper
(papernotes.org); the paper's own text was not to be had.

:summary: One pair per interval of alike layers, its rank by the entropy of their gradients
:equation: dW_l = s B_I A_I; intervals I by mutual information, ranks by max H(G_l) over I
:trap: It needs a look at the gradients before training; trials whose batches cut other intervals do
    not share compute in a pack.
:trap: Gradients are measured in units of 1e-8: as printed, the entropy of a usual gradient is
    negative and the rank rule turns around.
:trap: The printed budget N r over the intervals would not save a parameter; over the layers it
    gives the half that the paper's tables report.
:title: E²LoRA: Efficient and Effective Low-Rank Adaptation with Entropy-Guided Adaptive Sharing
:authors: Minglei Li, Peng Ye, Jingqi Ye, Haonan He, Tao Chen
:source: ICLR 2026, 2026: proxy entropy, LSS and HRA, as told by papernotes.org
:verified: abstract and a detailed note on the paper (papernotes.org); the text was not to be had,
    and LoRAFactory has a flag but no code
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.sharing.sharelora import ShareLoRA
from loralab.recipe import Evidence, OwnStart, Site


@dataclass(frozen=True)
class EntropyIntervals(OwnStart):
    """Sharing intervals among the layers of each kind, and their ranks.

    Args:
        unit: what gradients are measured in. With 1, as printed, entropies are negative wherever
            σ_G < 0.24, and the rank rule then favours the layers with least of it.
        budget: "layers" shares N r out over the N layers, so that fewer pairs mean fewer
            parameters, as in the paper's tables; "intervals" over the intervals, as in the note.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    unit: float = 1e-8
    budget: str = "layers"

    def __post_init__(self) -> None:
        if not self.unit > 0:
            raise UserError(f"unit of E²LoRA must be positive, not {self.unit!r}")
        if self.budget not in ("layers", "intervals"):
            raise UserError(f"budget of E²LoRA is 'layers' or 'intervals', not {self.budget!r}")

    def entropy(self, *moments: "Moments") -> float:
        """Return H of the entries of one gradient or of several together."""
        n, total, squares = (sum(m) for m in zip(*moments, strict=True))
        sigma = math.sqrt(max(squares / n - (total / n) ** 2, 0.0))
        # A gradient of zeros has the entropy of one unit.
        return math.log(max(sigma / self.unit, 1.0)) + 0.5 * math.log(2 * math.pi) + 0.5

    def intervals(self, moments: Sequence["Moments"]) -> list[list[int]]:
        """Return the layers' indices by interval, for the layers of one kind in their order."""
        H = [self.entropy(m) for m in moments]

        def rmi(i: int, j: int) -> float:
            return (H[i] + H[j] - self.entropy(moments[i], moments[j])) / min(H[i], H[j])

        found: list[list[int]] = []
        threshold = 0.0
        for i in range(len(H)):
            if not found or rmi(found[-1][0], i) < threshold:
                found.append([i])
                others = [rmi(i, k) for k in range(len(H)) if k != i]
                threshold = sum(others) / max(len(others), 1)
            else:
                found[-1].append(i)
        return found

    def _plan(
        self, sites: Sequence[Site], evidence: Callable[[Site], Evidence]
    ) -> dict[str, tuple[str, int]]:
        """Return (name of the group, rank) by site."""
        plan: dict[str, tuple[str, int]] = {}
        for kind in dict.fromkeys(s.kind for s in sites):
            own = [s for s in sites if s.kind == kind]
            moments = [moments_of(evidence(s)) for s in own]
            parts = self.intervals(moments)
            H = [max(self.entropy(moments[i]) for i in part) for part in parts]
            shares = [len(part) if self.budget == "layers" else 1 for part in parts]
            whole = sum(h * n for h, n in zip(H, shares, strict=True))
            total = sum(s.asked or s.rank for s in own)
            for part, h in zip(parts, H, strict=True):
                rank = max(1, round(total * h / whole))
                for site in (own[i] for i in part):
                    # The first layer of the interval gives the group its name.
                    plan[site.name] = (own[part[0]].name, min(rank, site.d_in, site.d_out))
        return plan

    def ranks(
        self, sites: Sequence[Site], evidence: Callable[[Site], Evidence]
    ) -> dict[str, int] | None:
        plan = self._plan(sites, evidence)
        return {s.name: plan[s.name][1] for s in sites}

    def groups(
        self, sites: Sequence[Site], evidence: Callable[[Site], Evidence]
    ) -> dict[str, str] | None:
        plan = self._plan(sites, evidence)
        return {s.name: plan[s.name][0] for s in sites}


Moments = tuple[float, float, float]  # count, sum and sum of squares


def moments_of(evidence: Evidence) -> Moments:
    """Return the moments of a gradient's entries.

    Raises:
        UserError: there is no gradient.
    """
    if evidence.gradient is None:
        raise UserError("E²LoRA looks at gradients: give `data`, an iterable of batches")
    G: Tensor = evidence.gradient.double()
    return float(G.numel()), G.sum().item(), G.square().sum().item()


register(
    "e2lora", "sharing", __doc__, ShareLoRA(share="AB", across="start"), start=EntropyIntervals()
)
