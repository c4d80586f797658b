"""A method is a recipe of four pieces: Form, Start, Rule, Schedule. Read this page first.

Orientation is PEFT's throughout: W is [out, in], A is [r, in], B is [out, r], and the adapted
layer computes with W + dW, where dW = s * (what the Form returns) and s is the Form's `scale`.

Pieces are frozen dataclasses of hyper-parameters with pure functions of tensors. They know no
module, device, dtype, merge or quantisation. Every tensor may carry leading pack axes, so a piece
indexes from the back (`.mT`, `dim=-1`); one trial is a pack of one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from loralab._callable import make_callable
from loralab.bounds import check_fields
from loralab.catalogue import Method as Method
from loralab.catalogue import Paper as Paper
from loralab.pieces import Evidence as Evidence
from loralab.pieces import Hyper as Hyper
from loralab.pieces import Look as Look
from loralab.pieces import Site as Site
from loralab.pieces import SiteState as SiteState
from loralab.pieces import Tensors as Tensors

LAYERS = frozenset({"Linear", "Conv1D", "Conv2d", "Embedding"})


class Piece:
    """What the four kinds have in common: they say with which others they do not work."""

    trained: ClassVar[frozenset[str]] = frozenset()  # tensors of the Form that it wants trained

    def __post_init__(self) -> None:
        """Check every hyper-parameter against its type (`loralab.bounds`)."""
        check_fields(self)

    def objection(self, recipe: "Recipe") -> tuple[str, str] | None:
        """Return why the piece cannot work in `recipe` although its declarations allow it, or None.

        The answer is the kind of the piece that it cannot meet ("form", "start", "rule",
        "schedule") and the reason, half a sentence that names no piece.
        """
        return None


class Form(Piece):
    """What is the update? Tensors, and what they do to the layer.

    A concrete Form is a frozen dataclass. It overrides `init` and one of

    * `factors(t, site) -> (B, A)` where dW = s B A, with B [*, out, k] and A [*, k, in]; or
    * `delta(t, site) -> D` where dW = s D, [*, out, in]; or
    * `branch(t, x, site) -> y`, the update applied to x [*, n, in], giving [*, n, out] before s.

    The core derives `delta` from `factors` and `branch` from either. A Form may give `delta` and a
    faster `branch`; a test proves them equal. A Form with `branch` alone cannot be merged.

    A Form that turns or rescales the base layer itself overrides `inner`, `outer` or both instead
    (W' x = outer(W inner(x))), or `base`, which gives the matrix in W's place.
    """

    pair: ClassVar[bool] = False  # owns A [r, in] and B [out, r] entering as B A: pair pieces fit
    owns: ClassVar[frozenset[str]] = frozenset()  # tensors that a piece may single out by name
    frozen: ClassVar[frozenset[str]] = frozenset()  # tensors never trained
    # Tensors that several sites have in common, sized by the largest of them: name to "model",
    # "kind" (sites of one name's last part), "layer" (sites of one block) or "start" (groups that
    # `Start.groups` names; the whole kind where it names none).
    shared: ClassVar[Mapping[str, str]] = {}
    # The axis along which a tensor's entries belong to ranks, counted from the back; `resize`
    # needs it.
    rank_axis: ClassVar[Mapping[str, int]] = {}
    needs: ClassVar[frozenset[str]] = frozenset()  # evidence that `init` looks at
    # What the core adds to t: "W", the base weight [1, out, in] in fp32; or what the user hands
    # over for the rows of a batch with `adapter.given(name=tensor)`, as [*, n, ...] like x. The
    # name "valid" is 1 for real tokens and 0 for padding, from the model's own attention_mask.
    # A given tensor that nobody hands over is absent from t.
    reads: ClassVar[frozenset[str]] = frozenset()
    by_sequence: ClassVar[bool] = False  # branch and aux_loss take x as [*, rows, tokens, in]
    draws_alike: ClassVar[bool] = False  # `draw` gets the same stream at every site of a model
    dense: ClassVar[bool] = False  # may keep a W-sized temporary per slot for backward
    # Of {"branch", "inner", "outer", "aux_loss"}: those whose steps between x and the result would
    # be kept for backward at a width like x's; backward runs them again instead.
    recomputed: ClassVar[frozenset[str]] = frozenset()
    any_rank: ClassVar[bool] = False  # the rank may exceed the layer's smaller side
    layers: ClassVar[frozenset[str]] = LAYERS  # kinds of layer that the formula makes sense on

    @property
    def rank_multiple(self) -> int:
        """Return what divides every rank that the Form can have; a Start's choices follow it."""
        return 1

    @property
    def departs(self) -> bool:
        """Return whether its own step 0 is not the base, on purpose."""
        return False

    def default_alpha(self, rank: int) -> float:
        """Return alpha when the user gives none; alpha = r (s = 1) as in arXiv 2602.04998."""
        return float(rank)

    def scale(self, alpha: float, rank: int) -> float:
        """Return s; LoRA's alpha / r (arXiv 2106.09685, section 4.1) unless overridden."""
        return alpha / rank

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return every tensor the Form owns (the shared ones too), without pack axes, on the CPU.

        A shared tensor is asked for once per group, with a site of the group's largest sizes.
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

    def inner(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        """Return what the base layer gets in place of x [*, n, in], in x's dtype; linear in x."""
        return x

    def outer(self, t: Tensors, y: Tensor, site: Site) -> Tensor:
        """Return what stands in place of y = W inner(x), [*, n, out], in y's dtype; linear.

        The bias stays apart: see `bias`.
        """
        return y

    def base(self, t: Tensors, W: Tensor, site: Site) -> Tensor:
        """Return the matrix [*, out, in] in place of W [out, in]; dW is added to it.

        A Form with `inner` gives it too where to turn W's rows is cheaper than to turn many inputs.
        """
        one = torch.eye(site.d_in, dtype=W.dtype, device=W.device)
        return self.outer(t, self.inner(t, one, site) @ W.mT, site).mT

    def bias(self, t: Tensors, b: Tensor, site: Site) -> Tensor:
        """Return the bias [*, out] in place of the layer's own b [out], if it has one.

        b is in fp32, or in fp64 for an fp64 base.
        """
        return b

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

    def routes(self, site: Site) -> bool:
        """Return whether `route` is asked at this site, which then leads a block."""
        return False

    def route(self, t: Tensors, x: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """Return which experts each input visits, and with what weight (sum 1): [*, n, V] each.

        For Forms whose experts are whole blocks (MixLoRA). x [*, n, in] is the input of
        `site.block`. The core runs the block once for each of the V visits, with t["expert"]
        [*, n] at all of its sites, and takes their weighted mean; "expert" must be in `reads`.
        """
        raise NotImplementedError

    def draw(self, site: Site, n: int, generator: torch.Generator) -> Tensors:
        """Return one slot's random tensors of one training step, for n input vectors.

        They are in t while the model trains and absent from it in evaluation.
        """
        raise NotImplementedError

    def penalty(self, t: Tensors, site: Site) -> Tensor | None:
        """Return a regulariser per slot [*] for the training loss only, or None."""
        return None

    def aux_loss(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        """Return a loss per slot [*] on the site's own inputs, for the training loss only.

        Overridden by Forms with a router: balance losses.
        """
        raise NotImplementedError


class Start(Piece):
    """Where does the update begin? Replaces some of the tensors that `Form.init` made."""

    # Of {"gradient", "covariance", "gradient_covariance"}: asks `adapt` for data.
    needs: ClassVar[frozenset[str]] = frozenset()
    pair_only: ClassVar[bool] = True  # fits Forms with `pair`; it returns A and B
    singles_out: ClassVar[frozenset[str]] = frozenset()  # fits Forms that own all of these
    keeps_scale: ClassVar[bool] = False  # s stays that of the rank asked for, whatever `ranks` says
    departs: ClassVar[bool] = False  # unless anchored, step 0 is not the base, on purpose
    anchored: bool = False  # the update is dW(t) - dW(t0): step 0 is exactly the base
    seeded: bool = True  # False: the same tensors for every seed, so trials may share one init

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return the tensors to replace, without pack axes."""
        raise NotImplementedError

    def ranks(self, sites: Sequence[Site], evidence: Look) -> dict[str, int] | None:
        """Return every site's rank by name from a look at all of them; None keeps those asked for.

        A rank of 0 leaves the site out.
        """
        return None

    def groups(self, sites: Sequence[Site], evidence: Look) -> dict[str, str] | None:
        """Return the name of every site's group, by site, for tensors shared within "start"."""
        return None


@dataclass(frozen=True)
class OwnStart(Start):
    """Keep the tensors that the Form itself makes."""

    pair_only: ClassVar[bool] = False

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        return {}


class Rule(Piece):
    """How does a gradient become a step?"""

    pair_only: ClassVar[bool] = False  # fits Forms with `pair`
    singles_out: ClassVar[frozenset[str]] = frozenset()  # fits Forms that own all of these
    inverts: ClassVar[bool] = False  # solves with Gram matrices, which amplifies rounding
    held_out: ClassVar[frozenset[str]] = frozenset()  # tensors whose gradient is of held-out data
    # Axes (from the back) of its memory that belong to ranks, where a name "x.A" does not say that
    # it has A's shape and A's axis; `resize` gathers them.
    memory_axes: ClassVar[Mapping[str, tuple[int, ...]]] = {}

    @property
    def unrolls(self) -> bool:
        """Return whether held-out gradients are taken through a step on the training data."""
        return False

    def trains(self, name: str) -> bool:
        """Return whether tensor `name` is trained at all."""
        return True

    def lr_ratio(self, name: str) -> float:
        """Return the factor on the learning rate for tensor `name`."""
        return 1.0

    def step(self, sites: Sequence[SiteState], hyper: Hyper) -> None:
        """Update every site's `t` in place from its `g`, keeping its memory in `state`."""
        raise NotImplementedError


class Schedule(Piece):
    """What changes over time? The default changes nothing."""

    pair_only: ClassVar[bool] = False  # fits Forms with `pair`
    singles_out: ClassVar[frozenset[str]] = frozenset()  # fits Forms that own all of these
    changes: ClassVar[frozenset[str]] = frozenset()  # the Form's frozen tensors that it changes
    resizes: ClassVar[bool] = False  # calls `SiteState.resize`: the Form needs a `rank_axis`
    held_out: ClassVar[bool] = False  # calls `SiteState.held_out_loss`

    def lr_factor(self, step: int, n_steps: int) -> float:
        """Return a factor on the learning rate of 0-based `step`, beside the trainer's schedule."""
        return 1.0

    def before_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Look at or change the gradients before the Rule's 0-based `step` (of `n_steps`)."""

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        """Look at or change the sites after optimizer step `step` (0-based, of `n_steps`)."""

    def searches(self, step: int, n_steps: int) -> bool:
        """Return whether tensors that the Rule holds out still learn at 0-based `step`."""
        return True

    def ranks(self, sites: Sequence[SiteState]) -> list[Tensor] | None:
        """Return the ranks in use at each site, [K] each, or None if they never change."""
        return None

    def next_task(self, sites: Sequence[SiteState], count: int) -> None:
        """Get ready for task number `count` (1 is the second) of a sequence of tasks."""


@dataclass(frozen=True)
class NoSchedule(Schedule):
    """Nothing changes."""


def plain_rule() -> Rule:
    """Return AdamW, which imports this module."""
    from loralab.training.adamw import AdamW

    return AdamW()


@dataclass(frozen=True)
class Recipe:
    """The four pieces of a method. Two trials with equal recipes can share a bank of tensors."""

    form: Form
    start: Start = field(default_factory=OwnStart)
    rule: Rule = field(default_factory=plain_rule)
    schedule: Schedule = field(default_factory=NoSchedule)

    @property
    def departs(self) -> bool:
        """Return whether step 0 is not the base, on purpose."""
        if self.start.anchored and type(self.form).base is Form.base:
            return False
        return self.form.departs or self.start.departs

    @property
    def pieces(self) -> dict[str, Any]:
        """Return {"form": ..., "start": ..., "rule": ..., "schedule": ...}."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


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
