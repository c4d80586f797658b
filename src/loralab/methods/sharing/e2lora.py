"""E²LoRA (OpenReview IQttyo0460; not on arXiv): the layers l of a sharing interval have one pair.
Intervals and their ranks come from the gradients G_l at the base.

Proxy entropy H(G) = log σ_G + ½ log 2π + ½, σ_G the spread of G's entries; I(G_i; G_j) = H(G_i) +
H(G_j) - H(G_i, G_j), of both together; RMI = I / min(H(G_i), H(G_j)). An interval grows from its
first layer m while RMI(m, l) >= τ_m, the mean of RMI(m, k) over the other k. The ranks share out
N r in proportion to an interval's largest H. E²ShareLoRA, with one A for all, is not offered.

:summary: One pair per interval of alike layers, its rank by the entropy of their gradients
:equation: dW_l = s B_I A_I; intervals I by mutual information, ranks by max H(G_l) over I
:trap: It needs a look at the gradients before training; trials whose batches cut other intervals do
    not share compute in a pack.
:trap: Gradients are measured in units of 1e-8: as printed (1), entropies are negative wherever
    σ_G < 0.24, and the rank rule turns around.
:trap: The printed budget N r over the intervals would not save a parameter; over the layers it
    gives the half that the paper's tables report.
:title: E²LoRA: Efficient and Effective Low-Rank Adaptation with Entropy-Guided Adaptive Sharing
:authors: Minglei Li, Peng Ye, Jingqi Ye, Haonan He, Tao Chen
:source: ICLR 2026, 2026: proxy entropy, LSS and HRA, as told by papernotes.org
:verified: abstract, a detailed note (papernotes.org) and an audit of the PDF in a public
    repository; the text was not to be had, and LoRAFactory has a flag but no code
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from loralab.bounds import Positive
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.sharing.sharelora import ShareLoRA
from loralab.recipe import Evidence, Look, OwnStart, Site

Moments = tuple[float, float, float]  # count, sum and sum of squares of a gradient's entries


@dataclass(frozen=True)
class EntropyIntervals(OwnStart):
    """Sharing intervals among the layers of each kind, and their ranks.

    Args:
        unit: what gradients are measured in.
        budget: N r shared out over the N "layers", or over the "intervals", as in the note.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    unit: Positive = 1e-8
    budget: Literal["layers", "intervals"] = "layers"

    def entropy(self, *moments: Moments) -> float:
        """Return H of the entries of one gradient or of several together."""
        n, total, squares = (sum(m) for m in zip(*moments, strict=True))
        sigma = math.sqrt(max(squares / n - (total / n) ** 2, 0.0))
        # A gradient of zeros has the entropy of one unit.
        return math.log(max(sigma / self.unit, 1.0)) + 0.5 * math.log(2 * math.pi) + 0.5

    def intervals(self, moments: Sequence[Moments]) -> list[list[int]]:
        """Return the layers' indices by interval, for the layers of one kind in their order."""
        H = [self.entropy(m) for m in moments]

        def rmi(i: int, j: int) -> float:
            return (H[i] + H[j] - self.entropy(moments[i], moments[j])) / min(H[i], H[j])

        found: list[list[int]] = []
        threshold = 0.0
        for i in range(len(H)):
            if found and rmi(found[-1][0], i) >= threshold:
                found[-1].append(i)
            else:
                found.append([i])
                others = [rmi(i, k) for k in range(len(H)) if k != i]
                threshold = sum(others) / max(len(others), 1)
        return found

    def plan(self, sites: Sequence[Site], evidence: Look) -> dict[str, tuple[str, int]]:
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

    def ranks(self, sites: Sequence[Site], evidence: Look) -> dict[str, int]:
        return {name: rank for name, (_, rank) in self.plan(sites, evidence).items()}

    def groups(self, sites: Sequence[Site], evidence: Look) -> dict[str, str]:
        return {name: group for name, (group, _) in self.plan(sites, evidence).items()}


def moments_of(evidence: Evidence) -> Moments:
    """Return the moments of a gradient's entries, or raise UserError if there is none."""
    if evidence.gradient is None:
        raise UserError("E²LoRA looks at gradients: give `data`, an iterable of batches")
    G = evidence.gradient.double()
    return float(G.numel()), G.sum().item(), G.square().sum().item()


register(
    "e2lora", "sharing", __doc__, ShareLoRA(share="AB", across="start"), start=EntropyIntervals()
)
