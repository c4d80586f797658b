"""A bank: the tensors of several like slots at one site, stacked as [K, ...]."""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from loralab.core.fused import AddLowRank, FusedLowRank
from loralab.core.layers import wide
from loralab.core.scaling import ScaleRows
from loralab.core.stopgrad import holds
from loralab.recipe import Form, Recipe, Site, Tensors

START = "_start"  # suffix of the frozen copies an anchored update is measured from


def kind(form: Form) -> str:
    """Return which of the three functions the Form gives: "factors", "delta" or "branch"."""
    cls = type(form)
    if cls.factors is not Form.factors:
        return "factors"
    return "delta" if cls.delta is not Form.delta else "branch"


def mergeable(form: Form) -> bool:
    """Return whether the Form has a dense dW."""
    return kind(form) != "branch"


def has_gain(form: Form) -> bool:
    """Return whether the Form rescales output rows."""
    return type(form).gain is not Form.gain


class Bank(nn.Module):
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
        self.fast_branch = type(self.form).branch is not Form.branch
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
        self._base_squares: Tensor | None = None  # |W_i|^2 [out], which never changes
        # Factors folded by restarts; they grow with each one.
        self.register_buffer("past_B", None, persistent=False)
        self.register_buffer("past_A", None, persistent=False)

    @property
    def size(self) -> int:
        """Return K."""
        return len(self.scale)

    def tensors(self, lo: int = 0, hi: int | None = None) -> Tensors:
        """Return all tensors of slots lo to hi by name."""
        whole = lo == 0 and hi in (None, self.size)
        return {n: getattr(self, n) if whole else getattr(self, n)[lo:hi] for n in self.names}

    def start_tensors(self, lo: int = 0, hi: int | None = None) -> Tensors:
        """Return the tensors at t0: the anchor where the update is measured from."""
        now = self.tensors(lo, hi)
        return now | {n: self._buffers[n + START][lo:hi] for n in self.trained}  # type: ignore[index]

    def factors(self, lo: int = 0, hi: int | None = None) -> tuple[Tensor, Tensor]:
        """Return (B, A) with dW = B A, s included, the anchor and restarts taken in."""
        B, A = self.unscaled_factors(lo, hi)
        return B if self._unscaled else B * self.scale[lo:hi, None, None], A

    def unscaled_factors(self, lo: int = 0, hi: int | None = None) -> tuple[Tensor, Tensor]:
        """Return (B, A) with dW = s B A, the anchor and restarts taken in.

        Anchored: B A - B0 A0 = (B - B0) A + B0 (A - A0), which is exactly 0 at t0 in any dtype.
        """
        B, A = self.form.factors(self.tensors(lo, hi), self.site)
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
        D = self.form.delta(self.tensors(lo, hi), self.site)
        if self.anchored:
            D = D - self.form.delta(self.start_tensors(lo, hi), self.site)
        return D * self.scale[lo:hi, None, None]

    def gain(self, weight: Tensor, lo: int = 0, hi: int | None = None) -> Tensor:
        """Return g [K, out] from the row norms of W + dW, in fp32."""
        constant = self.form.constant_norm and holds()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not constant):
            squares = self._row_squares(weight, lo, hi)
            # The sum can round below 0 where a row nearly vanishes; the floor keeps sqrt's slope.
            norm = squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
        return self.form.gain(self.tensors(lo, hi), norm)

    def _row_squares(self, weight: Tensor, lo: int, hi: int | None) -> Tensor:
        """Return |W_i + dW_i|^2 [K, out]; for factors without the dense product.

        |W_i + dW_i|^2 = |W_i|^2 + 2 <(W A^T)_i, B_i> + <B_i, (A A^T) B_i>.
        """
        if self._base_squares is None or self._base_squares.device != weight.device:
            self._base_squares = torch.cat([w.square().sum(-1) for w in _wide_rows(weight)])
        if self.kind != "factors":
            D = self.delta(lo, hi)
            cross = (wide(weight) * D).sum(-1)
            return self._base_squares + 2 * cross + D.square().sum(-1)
        B, A = self.factors(lo, hi)
        WA = torch.cat([w @ A.mT for w in _wide_rows(weight)], dim=-2)
        return self._base_squares + 2 * (WA * B).sum(-1) + ((B @ (A @ A.mT)) * B).sum(-1)

    def dense(self, weight: Tensor, slot: int) -> Tensor:
        """Return W' [out, in] of one slot in fp32 (fp64 for an fp64 base)."""
        merged = wide(weight) + self.delta(slot, slot + 1)[0]
        if self.gains:
            merged = merged * self.gain(weight, slot, slot + 1)[0][:, None]
        return merged

    def forward(
        self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, counts: Sequence[int]
    ) -> Tensor:
        """Return the adapted outputs of this bank's rows.

        Args:
            x: inputs of the low-rank branch, [rows, in], slot-major; `counts` rows for each slot.
            y: base outputs x W^T + bias, [rows, out].
        """
        if len(set(counts)) == 1:
            return self._run(x, y, weight, bias, 0, self.size)
        parts, row = [], 0
        for lo, hi in runs(counts):
            n = sum(counts[lo:hi])
            rows = slice(row, row + n)
            parts.append(self._run(x[rows], y[rows], weight, bias, lo, hi))
            row += n
        return torch.cat(parts)

    def fusible(self) -> bool:
        """Return whether the update is two factors and nothing else."""
        return self.kind == "factors" and (not self.fast_branch or self.past_B is not None)

    def fused(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the adapted output [rows, out], the base layer included, for equal row counts."""
        B, A = self.factors()
        if torch.is_grad_enabled() and not A.requires_grad:  # then x need not be kept
            base = nn.functional.linear(x, weight, bias)
            return self._run(x, base, weight, bias, 0, self.size)
        g = self.gain(weight) if self.gains else None
        x3 = x.view(self.size, len(x) // self.size, x.shape[-1])
        y = FusedLowRank.apply(x3, weight, bias, A.to(x.dtype), B.to(x.dtype), g)
        return y.flatten(0, 1)

    def _run(
        self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, lo: int, hi: int
    ) -> Tensor:
        k, dtype = hi - lo, x.dtype
        x3, y3 = x.view(k, -1, x.shape[-1]), y.view(k, -1, y.shape[-1])
        if self.fusible():
            B, A = self.factors(lo, hi)
            B, A = B.to(dtype), A.to(dtype)
            if A.requires_grad:
                z = AddLowRank.apply(x3, y3, A, B)
            else:  # autograd keeps h = x A^T here and not x
                z = torch.baddbmm(y3, torch.bmm(A, x3.mT).mT, B.mT)
        else:
            z = y3 + self._branch(x3, lo, hi)
        if self.gains:
            g = self.gain(weight, lo, hi)
            z = ScaleRows.apply(z, g)
            if bias is not None:  # g (z - bias) + bias, exact where g = 1
                z = z + ((1 - g) * bias).to(z.dtype)[:, None]
        return z.view(y.shape)

    def _branch(self, x: Tensor, lo: int, hi: int) -> Tensor:
        cast = lambda t: {n: v.to(x.dtype) for n, v in t.items()}  # noqa: E731
        if self.kind == "delta" and not self.fast_branch:
            # The anchor is subtracted before rounding, so that step 0 is exact in bf16 as well.
            return torch.bmm(x, self.delta(lo, hi).to(x.dtype).mT)
        out = self.form.branch(cast(self.tensors(lo, hi)), x, self.site)
        if self.anchored:
            out = out - self.form.branch(cast(self.start_tensors(lo, hi)), x, self.site)
        return out * self.scale[lo:hi, None, None].to(x.dtype)

    def penalty(self) -> Tensor | None:
        """Return the Form's training penalty per slot [K], or None."""
        return self.form.penalty(self.tensors(), self.site)

    def restart(self, fresh: Tensors) -> None:
        """Fold the present update into `past` and put `fresh` [K, ...] in place of A and B.

        `fresh` must start at zero: B or A is 0.
        """
        with torch.no_grad():
            B, A = self.factors()
            self.past_B, self.past_A = B / self.scale[:, None, None], A.clone()
            self.anchored = False
            for name, tensor in fresh.items():
                getattr(self, name).copy_(tensor)

    def keep(self, index: Tensor) -> None:
        """Keep only the slots at `index`, in that order; the pack itself sees to shared tensors."""
        for name in self.names:
            if name not in self.form.shared:
                value = getattr(self, name).detach()[index]
                self.register_parameter(name, nn.Parameter(value, name in self.trained))
        for name, buffer in list(self._buffers.items()):
            if buffer is not None:
                self._buffers[name] = buffer[index]


def _wide_rows(weight: Tensor, n_rows: int = 1024) -> list[Tensor] | Iterator[Tensor]:
    """Return W in fp32, a stretch of rows at a time where that makes a copy."""
    if wide(weight) is weight:
        return [weight]
    return (wide(part) for part in weight.split(n_rows))


def runs(counts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (lo, hi) of the longest stretches of equal counts."""
    lo = 0
    for hi in range(1, len(counts) + 1):
        if hi == len(counts) or counts[hi] != counts[lo]:
            yield lo, hi
            lo = hi
