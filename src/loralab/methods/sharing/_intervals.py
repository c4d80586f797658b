"""E²LoRA's sharing intervals: runs of layers whose gradients G at the base are alike (its LSS).

    H(G) = log σ_G + ½ log 2π + ½, with σ_G the spread of G's entries: the proxy entropy
    I(G_i; G_j) = H(G_i) + H(G_j) - H(G_i, G_j), the last one of the entries of both together
    RMI(i, j) = I(G_i; G_j) / min(H(G_i), H(G_j))

An interval grows from its first layer m while RMI(m, l) >= τ_m, the mean of RMI(m, k) over all
other k. As told by the note on the paper at papernotes.org.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from loralab.bounds import Positive
from loralab.errors import UserError
from loralab.recipe import Evidence, OwnStart

Moments = tuple[float, float, float]  # count, sum and sum of squares of a gradient's entries


def moments_of(evidence: Evidence) -> Moments:
    """Return the moments of a gradient's entries, or raise UserError if there is none."""
    if evidence.gradient is None:
        raise UserError("E²LoRA looks at gradients: give `data`, an iterable of batches")
    G = evidence.gradient.double()
    return float(G.numel()), G.sum().item(), G.square().sum().item()


@dataclass(frozen=True)
class Intervals(OwnStart):
    """What a start knows of layers by their gradients.

    Args:
        unit: what gradients are measured in.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    unit: Positive = 1e-8

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
