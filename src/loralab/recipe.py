"""A method is a recipe of four pieces: Form, Start, Rule, Schedule. Read this page first.

Orientation is PEFT's throughout: W is [out, in], A is [r, in], B is [out, r], and the adapted
layer computes with W + dW, where dW = s * (what the Form returns) and s is the Form's `scale`.

Pieces are frozen dataclasses of hyper-parameters with pure functions of tensors. They know no
module, device, dtype, merge or quantisation. Every tensor may carry leading pack axes, so a piece
indexes from the back (`.mT`, `dim=-1`); one trial is a pack of one.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from loralab._callable import make_callable
from loralab.seeds import generator

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Site:
    """One adapted layer as the pieces see it: a name and three numbers, never a module."""

    name: str
    d_in: int
    d_out: int
    rank: int


@dataclass(frozen=True)
class Evidence:
    """What a piece may look at when it fills its tensors for one site of one trial.

    Args:
        weight: the frozen base weight W in fp32 (fp64 for an fp64 base), [out, in].
        scale: s, the factor that the core puts before the Form's result.
        seed: the trial's seed.
        name: the site's name; with the seed it fixes every random draw.
        gradient: dL/dW at the base, [out, in], present if the Start `needs` "gradient".
    """

    weight: Tensor
    scale: float
    seed: int
    name: str
    gradient: Tensor | None = None

    def generator(self, purpose: str) -> torch.Generator:
        """Return a CPU generator fixed by (seed, site name, purpose)."""
        return generator(self.seed, self.name, purpose)


class Form:
    """What is the update? Tensors, and one of `factors`, `delta` and `branch`.

    A concrete Form is a frozen dataclass. It overrides `init` and

    * `factors(t, site) -> (B, A)` where dW = s B A, with B [*, out, k] and A [*, k, in]; or
    * `delta(t, site) -> D` where dW = s D, [*, out, in]; or
    * `branch(t, x, site) -> y`, the update applied to x [*, n, in], giving [*, n, out] before s.

    The core derives `delta` from `factors` and `branch` from either. A Form may give `delta` and a
    faster `branch`; a test proves them equal. A Form with `branch` alone cannot be merged.
    """

    pair: ClassVar[bool] = False  # owns A [r, in] and B [out, r] entering as B A: pair pieces fit
    owns: ClassVar[frozenset[str]] = frozenset()  # tensors that a Rule may single out by name
    frozen: ClassVar[frozenset[str]] = frozenset()  # tensors never trained
    shared: ClassVar[frozenset[str]] = frozenset()  # one tensor for all sites, sized by the largest
    dense: ClassVar[bool] = False  # may keep a W-sized temporary per slot for backward
    any_rank: ClassVar[bool] = False  # the rank may exceed the layer's smaller side

    def default_alpha(self, rank: int) -> float:
        """Return alpha when the user gives none; alpha = r (s = 1) as in arXiv 2602.04998."""
        return float(rank)

    def scale(self, alpha: float, rank: int) -> float:
        """Return s; LoRA's alpha / r (arXiv 2106.09685, section 4.1) unless overridden."""
        return alpha / rank

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return every tensor the Form owns (the shared ones too), without pack axes, on the CPU.

        A shared tensor is asked for once per trial, with a site of the largest sizes in the model.
        """
        raise NotImplementedError

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Return (B [*, out, k], A [*, k, in])."""
        raise NotImplementedError

    def delta(self, t: Tensors, site: Site) -> Tensor:
        """Return dW / s, [*, out, in]."""
        B, A = self.factors(t, site)
        return B @ A

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        """Return (dW / s) x for x [*, n, in], as [*, n, out]."""
        return x @ self.delta(t, site).mT

    def gain(self, t: Tensors, row_norm: Tensor) -> Tensor:
        """Return g [*, out] where W' = diag(g) (W + dW); `row_norm` is |W_i + dW_i|, [*, out].

        Overridden by Forms that rescale rows (DoRA); the core computes the norm without a dense
        product.
        """
        raise NotImplementedError

    @property
    def constant_norm(self) -> bool:
        """Return whether `gain` holds the row norm constant in the backward pass."""
        return False

    def penalty(self, t: Tensors, site: Site) -> Tensor | None:
        """Return a regulariser per slot [*] for the training loss only, or None."""
        return None


class Start:
    """Where does the update begin? Replaces some of the tensors that `Form.init` made."""

    needs: ClassVar[frozenset[str]] = frozenset()  # of {"gradient"}: asks `adapt` for data
    pair_only: ClassVar[bool] = True  # fits Forms with `pair`; it returns A and B
    anchored: bool = False  # the update is dW(t) - dW(t0): step 0 is exactly the base
    seeded: bool = True  # False: the same tensors for every seed, so trials may share one init

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return the tensors to replace, without pack axes."""
        raise NotImplementedError


@dataclass(frozen=True)
class OwnStart(Start):
    """Keep the tensors that the Form itself makes."""

    pair_only: ClassVar[bool] = False

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        return {}


class Hyper(NamedTuple):
    """Per-slot numbers of one step. All tensors are [K]. A slot with lr 0 must not move."""

    lr: Tensor
    weight_decay: Tensor


class SiteState:
    """One site of a running pack, as Rules and Schedules see it.

    Attributes:
        site: sizes and name.
        t: trained tensors by name, [K, ...]. Change them in place (under no_grad).
        g: their gradients, same names and shapes.
        state: the Rule's and Schedule's own tensors by name, each [K, ...]; saved in checkpoints.
    """

    site: Site
    t: Tensors
    g: Tensors
    state: Tensors
    first: int = 0  # the pack's number of its first slot

    def restart(self, count: int) -> None:
        """Fold the present update into a frozen low-rank term and start A, B anew (ReLoRA).

        The fresh tensors are seeded by (trial seed, site, count). The folded factors are the
        adapter's own tensors; the base weight is not touched.
        """
        raise NotImplementedError


class Rule:
    """How does a gradient become a step?"""

    pair_only: ClassVar[bool] = False  # fits Forms with `pair`
    singles_out: ClassVar[frozenset[str]] = frozenset()  # fits Forms that own all of these
    inverts: ClassVar[bool] = False  # solves with Gram matrices, which amplifies rounding

    def trains(self, name: str) -> bool:
        """Return whether tensor `name` is trained at all."""
        return True

    def lr_ratio(self, name: str) -> float:
        """Return the factor on the learning rate for tensor `name`."""
        return 1.0

    def step(self, sites: Sequence[SiteState], hyper: Hyper) -> None:
        """Update every site's `t` in place from its `g`, keeping its memory in `state`."""
        raise NotImplementedError


class Schedule:
    """What changes over time? The default changes nothing."""

    pair_only: ClassVar[bool] = False  # fits Forms with `pair`
    singles_out: ClassVar[frozenset[str]] = frozenset()  # fits Forms that own all of these

    def lr_factor(self, step: int, n_steps: int) -> float:
        """Return a factor on the learning rate of 0-based `step`, beside the trainer's schedule."""
        return 1.0

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Look at or change the sites after optimizer step `step` (0-based, of `n_steps`)."""


@dataclass(frozen=True)
class NoSchedule(Schedule):
    """Nothing changes."""


@dataclass(frozen=True)
class Recipe:
    """The four pieces of a method. Two trials with equal recipes can share a bank of tensors."""

    form: Form
    start: Start = field(default_factory=OwnStart)
    rule: Rule = None  # type: ignore[assignment]  # AdamW, filled in below to avoid a cycle
    schedule: Schedule = field(default_factory=NoSchedule)

    def __post_init__(self) -> None:
        if self.rule is None:
            from loralab.training.adamw import AdamW

            object.__setattr__(self, "rule", AdamW())

    @property
    def pieces(self) -> dict[str, Any]:
        """Return {"form": ..., "start": ..., "rule": ..., "schedule": ...}."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@dataclass(frozen=True)
class Paper:
    """Where a method comes from.

    Args:
        title, authors (comma-separated, first author first), year: as published.
        arxiv: the arXiv number, or an empty string with `venue` set.
        equation: where in the paper the implemented formula stands, such as "eq. 5, section 4.1".
        verified: what the formula was checked against ("paper", "authors' code", "survey ..."),
            honestly.
    """

    title: str
    authors: str
    year: int
    arxiv: str = ""
    venue: str = ""
    equation: str = ""
    verified: str = ""


@dataclass(frozen=True)
class Method:
    """A named recipe with its citation: one row of the catalogue.

    Args:
        axis: the taxonomy's axis, which is also the folder.
        summary: one line for the catalogue.
        traps: what goes wrong when the formula is misread, a sentence each.
        aliases: other names under which the method is found.
    """

    name: str
    axis: str
    recipe: Recipe
    paper: Paper
    summary: str
    equation: str
    traps: Sequence[str] = ()
    aliases: Sequence[str] = ()


def recipe(name: str, **swaps: Any) -> Recipe:
    """Return the recipe of method `name` with pieces swapped, also callable as `loralab.recipe`.

    Args:
        swaps: `form`, `init` (or `start`), `rule`, `schedule`: a piece or the name of a method that
            has it; anything else is a hyper-parameter of one of the pieces.

    Raises:
        UserError: unknown method or hyper-parameter, or pieces that cannot meet.
    """
    from loralab.methods import build

    return build(name, **swaps)


make_callable(__name__, "recipe")
