"""E²LoRA (OpenReview IQttyo0460; not on arXiv): the layers l of a sharing interval I have one pair.

Intervals follow from the mutual information of the gradients G_l at the base (`_intervals`). Their
ranks share out N r for N layers in proportion to max H(G_l) over I, H(G) = log σ_G + ½ log 2π + ½
with σ_G the spread of G's entries. E²ShareLoRA, with one A for all, is not offered.

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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loralab.methods import register
from loralab.methods.sharing._intervals import Intervals, moments_of
from loralab.methods.sharing.sharelora import ShareLoRA
from loralab.recipe import Look, Site


@dataclass(frozen=True)
class EntropyIntervals(Intervals):
    """Sharing intervals among the layers of each kind, and their ranks.

    Args:
        budget: N r shared out over the N "layers", or over the "intervals", as in the note.
    """

    budget: Literal["layers", "intervals"] = "layers"

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


register(
    "e2lora", "sharing", __doc__, ShareLoRA(share="AB", across="start"), start=EntropyIntervals()
)
