"""A bank: several like slots at one site, run on their rows of a batch."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from loralab.core.again import InRows, again, kept_inputs
from loralab.core.dense import Make, made_linear
from loralab.core.fused import AddHidden, AddLowRank, FusedHidden, FusedLowRank
from loralab.core.layers import Weight, product, read, wide
from loralab.core.scaling import ScaleRows
from loralab.core.update import PAST as PAST
from loralab.core.update import START as START
from loralab.core.update import Update, gives
from loralab.core.update import has_gain as has_gain
from loralab.core.update import kind as kind
from loralab.core.update import mergeable as mergeable
from loralab.errors import UserError
from loralab.recipe import Tensors


class Bank(Update):
    """An `Update` that adapts the outputs of its slots' rows."""

    def forward(
        self, x: Tensor, y: Tensor, weight: Weight, bias: Tensor | None, counts: Sequence[int]
    ) -> Tensor:
        """Return the adapted outputs of this bank's rows.

        Args:
            x: inputs of the low-rank branch, [rows, in], slot-major; `counts` rows for each slot.
            y: base outputs x W^T + bias, [rows, out].
        """
        if len(set(counts)) == 1:
            return self._run(x, y, weight, bias, 0, self.size)
        return torch.cat(
            [self._run(x[rows], y[rows], weight, bias, lo, hi) for lo, hi, rows in runs(counts)]
        )

    def fusible(self) -> bool:
        """Return whether the update is two factors and nothing else."""
        plain = not (self.frames or self.replaces or self.shifts)
        return (
            self.kind == "factors" and plain and (not self.fast_branch or self.past_B is not None)
        )

    def runs_base(self, weight: Weight) -> bool:
        """Return whether this bank computes the base product itself, from W."""
        made = self.kind == "delta" and not self.fast_branch
        alone = (made or self.spans) and _is_wide(weight) and not self.gains
        return self.frames or self.replaces or alone

    def fused(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """Return the adapted output [rows, out], the base layer included, for equal row counts."""
        if not self.fusible():
            return self._run(x, None, weight, bias, 0, self.size)
        B, A = self.factors()
        x3 = x.view(self.size, len(x) // self.size, x.shape[-1])
        if torch.is_grad_enabled() and not A.requires_grad:  # then x need not be kept
            if self.gains:
                return self._run(x, product(x, weight, bias), weight, bias, 0, self.size)
            h = torch.bmm(A.to(x.dtype), x3.mT)
            y = FusedHidden.apply(x3, weight, bias, h, A.to(x.dtype), B.to(x.dtype))
            return y.flatten(0, 1)
        g = self.gain(weight) if self.gains else None
        y = FusedLowRank.apply(x3, weight, bias, A.to(x.dtype), B.to(x.dtype), g)
        return y.flatten(0, 1)

    def _run(
        self, x: Tensor, y: Tensor | None, weight: Weight, bias: Tensor | None, lo: int, hi: int
    ) -> Tensor:
        """Return the outputs [rows, out] of slots lo to hi; y is the base's, None to compute it."""
        k = hi - lo
        x3 = x.view(k, -1, x.shape[-1]) if x.is_floating_point() else x.view(k, -1)
        z = self._updated(
            x3, None if y is None else y.view(k, -1, y.shape[-1]), weight, bias, lo, hi
        )
        if self.gains:
            g = self.gain(weight, lo, hi)
            z = ScaleRows.apply(z, g)
            if bias is not None:  # g (z - bias) + bias, exact where g = 1
                z = z + ((1 - g) * bias).to(z.dtype)[:, None]
        if self.shifts and bias is not None:
            z = z + self._shift(weight, wide(bias), lo, hi).to(z.dtype).expand(k, -1)[:, None]
        return z.flatten(0, 1)

    def _updated(
        self, x: Tensor, y: Tensor | None, weight: Weight, bias: Tensor | None, lo: int, hi: int
    ) -> Tensor:
        """Return base and update [k, n, out] without gain, for x [k, n, in] or indices [k, n]."""
        if self.fusible() and y is not None:
            B, A = self.factors(lo, hi)
            B, A = B.to(y.dtype), A.to(y.dtype)
            if not x.is_floating_point():
                return torch.baddbmm(y, picked(A, x) * self.input_scale, B.mT)
            if A.requires_grad:
                return AddLowRank.apply(x, y, A, B)
            return AddHidden.apply(torch.bmm(A, x.mT), y, B)
        turns = self.turns and y is None and _is_wide(weight) and x.shape[1] >= 2 * self.site.d_out
        if self.replaces or turns:
            y = self._made(x, weight, bias, lo, hi)
        elif self.frames:
            y = self._framed(x, y, weight, bias, lo, hi)
        elif self.runs_base(weight) and x.is_floating_point() and y is None and self._pays(x):
            return self._made(x, weight, bias, lo, hi)
        elif y is None:
            y = product(x, weight, bias)
        return y if self.kind == "nothing" else y + self._branch(x, weight, lo, hi)

    def _pays(self, x: Tensor) -> bool:
        """Return whether W + dW in one product beats two products with wide factors."""
        return not self.spans or x.shape[1] >= min(self.site.d_in, self.site.d_out)

    def _framed(
        self, x: Tensor, y: Tensor | None, weight: Weight, bias: Tensor | None, lo: int, hi: int
    ) -> Tensor:
        """Return outer(W inner(x)) + bias; y is the base's own output, if it has been computed."""
        dtype = x.dtype if y is None else y.dtype
        t = self.seen(lo, hi)  # as they are: a factor 1.001 is 1 in bf16
        if y is None:
            y = product(self._hook("inner", t, x).to(dtype), weight, bias)
        elif gives(self.form, "inner"):  # what has been computed otherwise stays to the bit
            turned = self._hook("inner", t, x) - x
            y = y + product(turned.to(dtype), weight)
        if not gives(self.form, "outer"):
            return y
        z = self._hook("outer", t, y)
        if bias is None:
            return z
        b = bias.to(dtype).expand(hi - lo, 1, -1)
        return z + (b - self.form.outer(t, b, self.site))  # exactly y where outer changes nothing

    def _shift(self, weight: Weight, b: Tensor, lo: int, hi: int) -> Tensor:
        """Return b' - b [k or 1, out], exactly 0 where b stays; backward reads W anew."""
        make, values = self._maker(lambda t: self.form.bias(t, b, self.site) - b, weight, lo, hi)
        return kept_inputs(make, *values)

    def _made(self, x: Tensor, weight: Weight, bias: Tensor | None, lo: int, hi: int) -> Tensor:
        """Return x M^T + bias with M built from the tensors now, and again in backward.

        M is the Form's own base, or W + dW in one product where that loses no precision.
        """

        def matrix(t: Tensors) -> Tensor:
            W = wide(read(weight))
            if self.replaces or self.turns:
                M = self.form.base(t, W, self.site)
                return M if M.dim() == 3 else M.expand(hi - lo, *M.shape)
            return W + self._delta_of(t, lo, hi)

        make, values = self._maker(matrix, weight, lo, hi)
        if not x.is_floating_point():
            return picked(make(values), x).to(weight.dtype) * self.input_scale
        return made_linear(make, x, bias, values)

    def _maker(
        self, matrix: Callable[[Tensors], Tensor], weight: Weight, lo: int, hi: int
    ) -> tuple[Make, list[Tensor]]:
        """Return `matrix` as a function of a list of tensors, and that list, without W."""
        t, around = self.tensors(lo, hi), self.context
        if around is not None:
            t |= around.stacked(lo, hi, with_weight=False)
        reads_W = around is not None and around.weight is not None
        names = list(t)

        def make(values: list[Tensor]) -> Tensor:
            own = dict(zip(names, values, strict=True))
            if reads_W:
                own["W"] = wide(read(weight))[None]
            return matrix(own)

        return make, list(t.values())

    def _branch(self, x: Tensor, weight: Weight, lo: int, hi: int) -> Tensor:
        """Return the update of x [k, n, in], or of indices [k, n], as [k, n, out]."""
        if not x.is_floating_point():
            return picked(self.delta(lo, hi).to(weight.dtype), x) * self.input_scale
        if self.kind == "factors" and not self.fast_branch:
            B, A = self.factors(lo, hi)
            return torch.bmm(torch.bmm(x, A.to(x.dtype).mT), B.to(x.dtype).mT)
        if self.kind == "delta" and not self.fast_branch:
            # The anchor is subtracted before rounding, so that step 0 is exact in bf16 as well.
            make, values = self._maker(lambda t: self._delta_of(t, lo, hi), weight, lo, hi)
            return made_linear(make, x, None, values)
        out = self._hook("branch", _cast(self.seen(lo, hi), x.dtype), self._shaped(x))
        if self.anchored:
            start = _cast(self.start_tensors(lo, hi), x.dtype)
            out = out - self._hook("branch", start, self._shaped(x))
        out = out.reshape(*x.shape[:-1], weight.shape[0])
        return out if self._unscaled else out * self.scale[lo:hi, None, None].to(x.dtype)

    def route(self, x: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        """Return one slot's experts and weights, [V, ...] each, for the block's input x [..., in].

        Raises:
            UserError: the block's input is not this layer's.
        """
        if x.shape[-1] != self.site.d_in:
            raise UserError(
                f"layer {self.site.name!r} routes the tokens of block {self.site.block!r} and "
                f"takes {self.site.d_in} inputs, not the block's {x.shape[-1]}; adapt the block's "
                "first layer too"
            )
        t = _cast(self.tensors(slot, slot + 1), x.dtype)
        expert, weight = self.form.route(t, x.reshape(1, -1, x.shape[-1]), self.site)
        return tuple(v[0].mT.unflatten(-1, x.shape[:-1]) for v in (expert, weight))  # type: ignore

    def aux_loss(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the Form's loss [K] on the inputs x [rows, in], `counts` rows for each slot."""
        parts = [self._aux_loss(stretch(x, rows), lo, hi) for lo, hi, rows in runs(counts)]
        return torch.cat(parts)

    def _aux_loss(self, x: Tensor, lo: int, hi: int) -> Tensor:
        t = _cast(self.seen(lo, hi), x.dtype)
        x = self._shaped(x.view(hi - lo, -1, x.shape[-1]))
        return wide(self._hook("aux_loss", t, x))

    def _hook(self, name: str, t: Tensors, x: Tensor) -> Tensor:
        """Return what the Form's function of this name gives for x."""
        function = getattr(self.form, name)
        if x.requires_grad:
            x = InRows.apply(x)
        if name in self.form.recomputed and torch.is_grad_enabled():
            return again(function, t, x, self.site)
        return function(t, x, self.site)

    def _shaped(self, x: Tensor) -> Tensor:
        """Return x [k, n, in] as the Form takes it."""
        if not self.form.by_sequence or self.context is None:
            return x
        return x.unflatten(1, (-1, self.context.tokens))


def stretch(v: Tensor, rows: slice) -> Tensor:
    """Return v[rows]; v itself where that is all of it, for a slice costs the gradient a copy."""
    return v if rows == slice(0, len(v)) else v[rows]


def picked(M: Tensor, index: Tensor) -> Tensor:
    """Return M's columns at index [k, n], as the product of M [k, m, in] with one-hot vectors."""
    return M.mT.gather(1, index[..., None].expand(-1, -1, M.shape[-2]))


def _cast(t: Tensors, dtype: torch.dtype) -> Tensors:
    return {n: v.to(dtype) if v.is_floating_point() else v for n, v in t.items()}


def _is_wide(weight: Weight) -> bool:
    """Return whether W is a tensor in the precision of adapter arithmetic."""
    return isinstance(weight, Tensor) and wide(weight) is weight


def runs(counts: Sequence[int]) -> Iterator[tuple[int, int, slice]]:
    """Yield (lo, hi, their rows) of the longest stretches of equal counts."""
    lo = row = 0
    for hi in range(1, len(counts) + 1):
        if hi == len(counts) or counts[hi] != counts[lo]:
            n = sum(counts[lo:hi])
            yield lo, hi, slice(row, row + n)
            lo, row = hi, row + n
