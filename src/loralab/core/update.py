"""The update of several like slots at one site: their tensors, stacked as [K, ...], and dW."""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from loralab.core.context import Context
from loralab.core.layers import Weight, read, wide
from loralab.core.stopgrad import holds
from loralab.recipe import Form, Recipe, Schedule, Site, Start, Tensors

PAST = ("past_B", "past_A")
START = "_start"  # suffix of the frozen copies an anchored update is measured from


def gives(piece: Any, *hooks: str) -> bool:
    """Return whether the piece overrides one of these functions of its kind."""
    plain = next(c for c in type(piece).__mro__ if c in (Form, Start, Schedule))
    return any(getattr(type(piece), hook) is not getattr(plain, hook) for hook in hooks)


def kind(form: Form) -> str:
    """Return what the Form adds: "factors", "delta", "branch", or "nothing" beside the frame."""
    for hook in ("factors", "delta", "branch"):
        if gives(form, hook):
            return hook
    return "nothing"


def mergeable(form: Form) -> bool:
    """Return whether the Form has a dense dW."""
    return kind(form) != "branch"


def replaces(form: Form) -> bool:
    """Return whether the Form has no way but to put another matrix in W's place."""
    return gives(form, "base") and not gives(form, "inner", "outer")


def has_gain(form: Form) -> bool:
    """Return whether the Form rescales output rows."""
    return gives(form, "gain")


class Update(nn.Module):
    """K slots of one recipe and rank at one site.

    Trained tensors are parameters [K, ...]; frozen ones are parameters without gradient (not
    buffers, so that one shared tensor stays one tensor when the model moves to another device).
    """

    scale: Tensor
    past_B: Tensor | None
    past_A: Tensor | None

    def __init__(
        self, recipe: Recipe, site: Site, tensors: Tensors, scale: Tensor, dropout: float
    ) -> None:
        super().__init__()
        self.form, self.rule, self.schedule = recipe.form, recipe.rule, recipe.schedule
        self.anchored, self.site, self.dropout = recipe.start.anchored, site, dropout
        self.kind, self.gains = kind(recipe.form), has_gain(recipe.form)
        self.fast_branch = gives(self.form, "branch")
        self.spans = self.kind == "factors" and self.form.dense  # factors as wide as the layer
        self.frames = gives(self.form, "inner", "outer")  # the base layer runs with a changed x, y
        self.replaces = replaces(self.form)  # the base layer's matrix is another one
        self.turns = self.frames and gives(self.form, "base")  # or is so where x has more rows
        self.shifts = gives(self.form, "bias")  # the layer's bias is another one
        self.draws, self.has_aux_loss = gives(self.form, "draw"), gives(self.form, "aux_loss")
        # Experts are whole blocks, and this is the layer that routes a block's input.
        routed = site.leads and bool(site.block) and self.form.routes(site)
        self.routes = routed and gives(self.form, "route")
        self.looks_around = bool(self.draws or self.form.reads or self.form.by_sequence)
        self.input_scale = 1.0  # what a scaled embedding multiplies its rows by
        self.context: Context | None = None
        self.trained = [n for n in tensors if n not in self.form.frozen and self.rule.trains(n)]
        self.names = list(tensors)
        for name, tensor in tensors.items():
            shared = isinstance(tensor, nn.Parameter)
            value = tensor if shared else nn.Parameter(tensor, name in self.trained)
            self.register_parameter(name, cast(nn.Parameter, value))
        if self.anchored:
            for name in self.trained:
                start = getattr(self, name).detach().clone()
                self.register_buffer(name + START, start, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self._unscaled = bool((scale == 1).all())  # alpha = r, the default of most methods
        self.elsewhere: frozenset[str] = frozenset()  # shared tensors that another bank writes
        self._base_squares: Tensor | None = None  # |W_i|^2 [out], which never changes
        # Factors folded by restarts; they grow with each one.
        self.register_buffer("past_B", None, persistent=False)
        self.register_buffer("past_A", None, persistent=False)

    @property
    def size(self) -> int:
        """Return K."""
        return len(self.scale)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Write every shared tensor once: safetensors refuses one tensor under two names."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.elsewhere:
            destination.pop(prefix + name, None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        missing, own = args[2], {prefix + name for name in self.elsewhere}
        missing[:] = [key for key in missing if key not in own]

    def tensors(self, lo: int = 0, hi: int | None = None) -> Tensors:
        """Return all tensors of slots lo to hi by name."""
        whole = lo == 0 and hi in (None, self.size)
        return {n: getattr(self, n) if whole else getattr(self, n)[lo:hi] for n in self.names}

    def seen(self, lo: int = 0, hi: int | None = None) -> Tensors:
        """Return the tensors with what the Form reads and draws while the layer runs."""
        t = self.tensors(lo, hi)
        return t if self.context is None else t | self.context.stacked(lo, hi)

    def start_tensors(
        self, lo: int = 0, hi: int | None = None, now: Tensors | None = None
    ) -> Tensors:
        """Return the tensors at t0: the anchor where the update is measured from."""
        now = self.seen(lo, hi) if now is None else now
        return now | {n: self._buffers[n + START][lo:hi] for n in self.trained}  # type: ignore[index]

    def factors(self, lo: int = 0, hi: int | None = None) -> tuple[Tensor, Tensor]:
        """Return (B, A) with dW = B A, s included, the anchor and restarts taken in."""
        B, A = self.unscaled_factors(lo, hi)
        return B if self._unscaled else B * self.scale[lo:hi, None, None], A

    def unscaled_factors(self, lo: int = 0, hi: int | None = None) -> tuple[Tensor, Tensor]:
        """Return (B, A) with dW = s B A, the anchor and restarts taken in.

        Anchored: B A - B0 A0 = (B - B0) A + B0 (A - A0), which is exactly 0 at t0 in any dtype.
        """
        B, A = self.form.factors(self.seen(lo, hi), self.site)
        if self.anchored:
            B0, A0 = self.form.factors(self.start_tensors(lo, hi), self.site)
            B, A = torch.cat([B - B0, B0.expand_as(B)], -1), torch.cat([A, A - A0], -2)
        if self.past_B is not None and self.past_A is not None:
            B = torch.cat([B, self.past_B[lo:hi]], -1)
            A = torch.cat([A, self.past_A[lo:hi]], -2)
        return B, A

    def delta(self, lo: int = 0, hi: int | None = None) -> Tensor:
        """Return dW [K, out, in], s included, before any gain."""
        if self.kind == "factors":
            B, A = self.factors(lo, hi)
            return B @ A
        return self._delta_of(self.seen(lo, hi), lo, hi)

    def _delta_of(self, t: Tensors, lo: int, hi: int | None) -> Tensor:
        """Return dW for the tensors t of slots lo to hi of a Form that gives `delta`."""
        D = self.form.delta(t, self.site)
        if self.anchored:
            D = D - self.form.delta(self.start_tensors(lo, hi, t), self.site)
        return D if self._unscaled else D * self.scale[lo:hi, None, None]

    def gain(self, weight: Weight, lo: int = 0, hi: int | None = None) -> Tensor:
        """Return g [K, out] from the row norms of W + dW, in fp32."""
        constant = self.form.constant_norm and holds()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not constant):
            squares = self._row_squares(weight, lo, hi)
            # The sum can round below 0 where a row nearly vanishes; the floor keeps sqrt's slope.
            norm = squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
        return self.form.gain(self.seen(lo, hi), norm)

    def _row_squares(self, weight: Weight, lo: int, hi: int | None) -> Tensor:
        """Return |W_i + dW_i|^2 [K, out]; for factors without the dense product.

        |W_i + dW_i|^2 = |W_i|^2 + 2 <(W A^T)_i, B_i> + <B_i, (A A^T) B_i>.
        """
        if self._base_squares is None or self._base_squares.device != weight.device:
            parts = [w.square().sum(-1) for w in _wide_rows(read(weight))]
            self._base_squares = torch.cat(parts)
        if self.kind != "factors":
            D = self.delta(lo, hi)
            cross = (wide(read(weight)) * D).sum(-1)
            return self._base_squares + 2 * cross + D.square().sum(-1)
        B, A = self.factors(lo, hi)
        if isinstance(weight, Tensor):
            WA = torch.cat([w @ A.mT for w in _wide_rows(weight)], dim=-2)
        else:
            WA = weight.linear(A).mT
        return self._base_squares + 2 * (WA * B).sum(-1) + ((B @ (A @ A.mT)) * B).sum(-1)

    def dense(self, weight: Weight, slot: int) -> Tensor:
        """Return W' [out, in] of one slot in fp32 (fp64 for an fp64 base)."""
        with self.reading(weight):
            merged = wide(read(weight))
            if self.frames or self.replaces:
                merged = self.form.base(self.seen(slot, slot + 1), merged, self.site)[0]
            if self.kind != "nothing":
                merged = merged + self.delta(slot, slot + 1)[0]
            if self.gains:
                merged = merged * self.gain(weight, slot, slot + 1)[0][:, None]
        return merged

    def biased(self, weight: Weight, bias: Tensor, slot: int) -> Tensor:
        """Return the bias [out] of one slot in fp32 (fp64 for an fp64 base)."""
        with self.reading(weight):
            return self.form.bias(self.seen(slot, slot + 1), wide(bias), self.site).view(-1)

    @contextlib.contextmanager
    def reading(self, weight: Weight) -> Iterator[None]:
        """Let the Form read W inside, without a batch and without draws."""
        before, self.context = self.context, Context(weight if "W" in self.form.reads else None)
        try:
            yield
        finally:
            self.context = before

    def penalty(self) -> Tensor | None:
        """Return the Form's training penalty per slot [K], or None."""
        return self.form.penalty(self.tensors(), self.site)


def _wide_rows(weight: Tensor, n_rows: int = 1024) -> list[Tensor] | Iterator[Tensor]:
    """Return W in fp32, a stretch of rows at a time where that makes a copy."""
    if wide(weight) is weight:
        return [weight]
    return (wide(part) for part in weight.split(n_rows))
