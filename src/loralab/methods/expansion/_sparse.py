"""Forms with a few trained coefficients at random entries of a matrix of W's size."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import Count, CountOrZero
from loralab.recipe import LAYERS, Evidence, Form, Site, Tensors
from loralab.seeds import stable_seed


def entries_seed(method: str, seed: int) -> int:
    """Return the seed of the random entries in the trial of this seed; PEFT's random_loc_seed."""
    return stable_seed(seed, method, "entries")


def random_entries(n: int, m: int, d: int, seed: int) -> Tensor:
    """Return n distinct flat positions in [m, d], drawn as in PEFT: one seed for all sizes."""
    return torch.randperm(m * d, generator=torch.Generator().manual_seed(seed))[:n]


def rows_and_diagonal(m: int, n: int, count: int) -> Tensor:
    """Return the places of the diagonal and of as many evenly spaced rows as `count` allows."""
    n_rows = min(m, max(0, count - min(m, n)) // n)
    on = torch.zeros(m, n, dtype=torch.bool)
    on.diagonal().fill_(True)
    if n_rows:
        on[:: -(-m // n_rows)] = True
    return on.flatten().nonzero().squeeze(-1)


def spread(c: Tensor, entries: Tensor, site: Site) -> Tensor:
    """Return [*, out, in] with c [*, n] at the flat positions `entries` and 0 elsewhere."""
    zeros = c.new_zeros(*c.shape[:-1], site.d_out * site.d_in)
    return zeros.scatter(-1, entries.expand(c.shape), c).unflatten(-1, (site.d_out, -1))


@dataclass(frozen=True)
class SparseForm(Form):
    """A transform of n coefficients c; alpha is the whole scale.

    Args:
        n: coefficients per layer, at most as many as it has weights.
        loc_seed: seed of the entries' places; None takes it from the trial's seed.
    """

    frozen: ClassVar[frozenset[str]] = frozenset({"entries"})
    any_rank: ClassVar[bool] = True
    layers: ClassVar[frozenset[str]] = LAYERS - {"Embedding"}
    method: ClassVar[str]  # whose name the seed is made from

    n: Count
    loc_seed: CountOrZero | None = None

    def scale(self, alpha: float, rank: int) -> float:
        return alpha

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return c [n] = 0 and the frozen positions [n]."""
        seed = self.loc_seed
        if seed is None:
            seed = entries_seed(self.method, evidence.seed)
        entries = random_entries(self.n, site.d_out, site.d_in, seed).to(evidence.weight.device)
        return {"c": evidence.weight.new_zeros(entries.shape), "entries": entries}

    def spread(self, t: Tensors, site: Site) -> Tensor:
        """Return [*, out, in] with c at its entries and 0 elsewhere."""
        return spread(t["c"], t["entries"], site)
