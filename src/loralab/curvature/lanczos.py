"""Lanczos with full re-orthogonalisation, for both ends of a symmetric operator's spectrum."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ends:
    """Both ends of a spectrum.

    Attributes:
        lambda_max, lambda_min: the extreme Ritz values; lambda_max is a lower bound and lambda_min
            an upper bound in exact arithmetic.
        residual: bound on the larger of the two errors, |beta_j s_j| (Paige 1971).
        n_products: operator products used.
    """

    lambda_max: float
    lambda_min: float
    residual: float
    n_products: int


class Lanczos:
    """One Lanczos process, fed from outside: take `vector`, give `advance(H vector)`.

    Written so that one packed product can serve many processes at once. The basis is
    re-orthogonalised twice against all earlier vectors, so no ghost values appear.

    Args:
        start: start vector [n], not zero.
        rtol: stop when the residual bound of both ends is below rtol times the larger |value|.
        max_products: stop at the latest after so many products.
    """

    def __init__(self, start: Tensor, rtol: float = 1e-2, max_products: int = 60) -> None:
        self.rtol, self.max_products = rtol, min(max_products, start.numel())
        self._basis = [start / start.norm()]
        self._alpha: list[float] = []
        self._beta: list[float] = []
        self.done = False

    @property
    def vector(self) -> Tensor:
        """Return the unit vector whose product is wanted next, [n]."""
        return self._basis[-1]

    def advance(self, product: Tensor) -> None:
        """Take H times `vector`, [n]."""
        w, basis = product.clone(), torch.stack(self._basis)
        self._alpha.append(float(w @ self._basis[-1]))
        for _ in range(2):
            w = w - basis.mT @ (basis @ w)
        beta = float(w.norm())
        self._beta.append(beta)
        ends, scale = self.ends(), max(map(abs, self._alpha + self._beta))
        exhausted = len(self._alpha) >= self.max_products or beta <= 1e-6 * scale
        largest = max(abs(ends.lambda_max), abs(ends.lambda_min))
        settled = len(self._alpha) >= 3 and ends.residual <= self.rtol * largest
        self.done = exhausted or settled
        if not self.done:
            self._basis.append(w / beta)

    def ends(self) -> Ends:
        """Return the present estimate."""
        n = len(self._alpha)
        T = torch.diag(torch.tensor(self._alpha, dtype=torch.float64))
        if n > 1:
            off = torch.tensor(self._beta[: n - 1], dtype=torch.float64)
            T = T + torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(T)
        residual = self._beta[-1] * float(max(vectors[-1, 0].abs(), vectors[-1, -1].abs()))
        return Ends(float(values[-1]), float(values[0]), residual, n)


def lanczos(
    matvec: Callable[[Tensor], Tensor], start: Tensor, rtol: float = 1e-2, max_products: int = 60
) -> Ends:
    """Return both ends of the spectrum of a symmetric `matvec` on vectors like `start` [n]."""
    process = Lanczos(start, rtol, max_products)
    while not process.done:
        process.advance(matvec(process.vector))
    return process.ends()
