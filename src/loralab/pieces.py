"""What the pieces of a recipe are handed: sites, evidence, numbers of a step, a running site."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loralab.seeds import generator

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Site:
    """One adapted layer as the pieces see it: a name and some numbers, never a module.

    An Embedding is the matrix that it applies to one-hot vectors, a Conv2d the one that it applies
    to its unfolded patches (d_in = channels * height * width of the kernel).

    Args:
        kind: the last part of the name, such as "q_proj".
        layer: number of the transformer block it belongs to, counted over the adapted sites.
        n_layers: how many such blocks there are.
        asked: the rank the user asked for, where a Start or a Schedule has chosen another; else 0.
        has_bias: whether the layer adds a bias.
        block: name of the module that holds this layer beside other adapted ones, such as a
            feed-forward block; empty where there is none.
        leads: whether it is the first of its block, or has none.
    """

    name: str
    d_in: int
    d_out: int
    rank: int
    kind: str = ""
    layer: int = 0
    n_layers: int = 1
    asked: int = 0
    has_bias: bool = False
    block: str = ""
    leads: bool = True


@dataclass(frozen=True)
class Evidence:
    """What a piece may look at when it fills its tensors for one site of one trial.

    Args:
        weight: the frozen base weight W in fp32 (fp64 for an fp64 base), [out, in].
        scale: s, the factor that the core puts before the Form's result.
        seed: the trial's seed.
        name: the site's name; with the seed it fixes every random draw.
        gradient: dL/dW at the base, mean over batches, [out, in].
        covariance: mean of x x^T over the valid tokens of the site's inputs, [in, in].
        gradient_covariance: mean of g g^T over the same tokens, g = dL/dy of the summed loss of a
            row, [out, out].

    The last three are None unless the Start or the Form `needs` them by name.
    """

    weight: Tensor
    scale: float
    seed: int
    name: str
    gradient: Tensor | None = None
    covariance: Tensor | None = None
    gradient_covariance: Tensor | None = None

    def generator(self, purpose: str) -> torch.Generator:
        """Return a CPU generator fixed by (seed, site name, purpose)."""
        return generator(self.seed, self.name, purpose)


Look = Callable[[Site], Evidence]  # what a Start sees of any site before it chooses


class Hyper(NamedTuple):
    """Per-slot numbers of one step. All tensors are [K]. A slot with lr 0 must not move."""

    lr: Tensor
    weight_decay: Tensor


class SiteState:
    """One site of a running pack, as Rules and Schedules see it.

    Attributes:
        site: sizes and name.
        t: trained tensors by name, [K, ...]. Change them in place (under no_grad).
        g: their gradients, same names and shapes; a Schedule's `before_step` may change them.
        fixed: the Form's frozen own tensors by name, [K, ...]; a Schedule may change them in place.
        state: the Rule's and Schedule's own tensors by name, each [K, ...]; saved in checkpoints.
        scale: s per slot, [K].
        seeds: the trials' seeds, one per slot.
        weight: the frozen base weight W in fp32 (fp64 for an fp64 base), [out, in].
        n_folded: ranks that `fold` has put into the frozen low-rank term so far, [K]; a slot's
            ranks of nothing but zeros do not count.
    """

    site: Site
    t: Tensors
    g: Tensors
    fixed: Tensors
    state: Tensors
    scale: Tensor
    seeds: Sequence[int]
    weight: Tensor
    n_folded: Tensor

    def generator(self, slot: int, *purpose: object) -> torch.Generator:
        """Return a CPU generator fixed by (the slot's seed, site name, purpose)."""
        return generator(self.seeds[slot], self.site.name, *purpose)

    def fold(self, share: float = 1.0) -> None:
        """Move `share` of the present update into a frozen low-rank term; B keeps 1 - share of it.

        The function does not change. The folded factors are the adapter's own tensors; the base
        weight is not touched. Needs a pair Form.
        """
        raise NotImplementedError

    def renew(self, count: int) -> None:
        """Start the pair (or all own tensors) anew, seeded by (trial seed, site, count).

        The fresh update is 0 whatever the Start was: anchoring ends with the first renewal.
        """
        raise NotImplementedError

    def restart(self, count: int) -> None:
        """Fold all of the update and renew (ReLoRA)."""
        self.fold()
        self.renew(count)

    def resize(self, index: Tensor) -> None:
        """Give the site other ranks: compute and memory follow.

        Every tensor in the Form's `rank_axis`, and the Rule's memory of it, is gathered along that
        axis. The update's scale s stays what it was.

        Args:
            index: [K, r'], the old rank that becomes each new one, or -1 for a new rank, whose
                entries are 0 for the caller to fill. Slots with fewer ranks than r' keep the rest
                at 0 by themselves.
        """
        raise NotImplementedError

    def held_out_loss(self) -> Tensor:
        """Return each slot's loss [K] on its present batch of held-out data, without gradient."""
        raise NotImplementedError
