"""Forms with experts side by side under a router, and the tensors that they start from."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.bounds import Count, NonNegative
from loralab.errors import UserError
from loralab.methods.expansion.lora import uniform
from loralab.methods.experts._routing import balance, chosen, mix, router, top_k
from loralab.recipe import LAYERS, Evidence, Form, Site, Tensors

# Not on an Embedding, whose inputs are one-hot: a router would be a second table of its size.
ROUTED_LAYERS = LAYERS - {"Embedding"}


def expert_tensors(site: Site, evidence: Evidence, n_experts: int) -> Tensors:
    """Return N experts' A ~ U(±1/√n) [N r, in] and B = 0 [out, N r], and the router W_g [N, in].

    The router starts as a linear layer does, from U(±1/√n).
    """
    n, width = site.d_in, n_experts * site.rank
    return {
        "A": uniform(evidence, "A", width, n, bound=n**-0.5),
        "B": evidence.weight.new_zeros(site.d_out, width),
        "W_g": uniform(evidence, "W_g", n_experts, n, bound=n**-0.5),
    }


def check_experts(method: str, n_experts: int, k: int) -> None:
    """Raise UserError if more experts shall be chosen than there are."""
    if k > n_experts:
        raise UserError(f"top_k of {method} is from 1 to its {n_experts} experts, not {k}")


class Routed(Form):
    """Base of Forms whose experts A, B lie side by side under a router W_g."""

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "W_g"})
    reads: ClassVar[frozenset[str]] = frozenset({"valid"})
    layers: ClassVar[frozenset[str]] = ROUTED_LAYERS


@dataclass(frozen=True)
class Experts(Routed):
    """The same number of experts at every site.

    Args:
        n_experts: N.
    """

    n_experts: Count = 8

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [N r, in], B [out, N r] = 0 and W_g [N, in]."""
        return expert_tensors(site, evidence, self.n_experts)


@dataclass(frozen=True)
class ByDomain(Experts):
    """Experts of whole sequences, whose domain may be given: a number per row, -1 for unknown."""

    reads: ClassVar[frozenset[str]] = frozenset({"domain", "valid"})
    by_sequence: ClassVar[bool] = True


@dataclass(frozen=True)
class TopK(Experts):
    """y = Σ ω_i(x) B_i A_i x, ω the top k of softmax(W_g x) divided by their sum.

    Args:
        top_k: k, the experts of a token.
        balance: weight of the balance loss N Σ f_i P_i.
    """

    top_k: Count = 2
    balance: NonNegative = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_experts(type(self).__name__, self.n_experts, self.top_k)

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        return mix(top_k(router(t, x), self.top_k), x, t["A"], t["B"])

    def aux_loss(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        p = router(t, x)
        return self.balance * balance(p, chosen(p, self.top_k), t)
