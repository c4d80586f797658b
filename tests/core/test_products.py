"""The products with gradients of their own: first and second derivatives, and what they keep."""

import pytest
import torch
import torch.nn.functional as F

from loralab.core.fused import AddHidden, AddLowRank, FusedHidden, FusedLowRank
from loralab.core.mixture import Mixture

K, TOKENS, IN, OUT = 2, 3, 4, 5


def draw(*shape, seed=0, grad=True):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_(grad)


def parts(r):
    """Return x, W and b, frozen, A and B."""
    x, W = draw(K, TOKENS, IN), draw(OUT, IN, seed=1, grad=False)
    b = draw(OUT, seed=2, grad=False)
    return x, W, b, draw(K, r, IN, seed=3), draw(K, OUT, r, seed=4)


def low_rank(x, W, b, A, B, g):
    z = x @ W.mT + x @ A.mT @ B.mT
    return (z if g is None else g.unsqueeze(-2) * z) + b


def check(ours, plain, inputs):
    torch.testing.assert_close(ours(*inputs), plain(*inputs))
    assert torch.autograd.gradcheck(ours, inputs)
    assert torch.autograd.gradgradcheck(ours, inputs)


@pytest.mark.parametrize("r", [1, 3, 8])
@pytest.mark.parametrize("gain", [False, True])
def test_a_trained_pair_in_the_layer(r, gain):
    x, W, b, A, B = parts(r)
    given = (x, A, B, draw(K, OUT, seed=5)) if gain else (x, A, B)
    check(
        lambda x, A, B, g=None: FusedLowRank.apply(x, W, b, A, B, g),
        lambda x, A, B, g=None: low_rank(x, W, b, A, B, g),
        given,
    )


@pytest.mark.parametrize("r", [1, 3, 8])
def test_a_frozen_A_in_the_layer(r):
    x, W, b, A, B = parts(r)
    A = A.detach()
    check(
        lambda x, B: FusedHidden.apply(x, W, b, torch.bmm(A, x.mT), A, B),
        lambda x, B: low_rank(x, W, b, A, B, None),
        (x, B),
    )


def test_with_a_frozen_A_the_input_is_not_kept():
    x, W, b, A, B = parts(3)
    A, kept = A.detach(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: kept.append(s) or s, lambda s: s):
        FusedHidden.apply(x, W, b, torch.bmm(A, x.mT), A, B)
    assert x.data_ptr() not in {s.data_ptr() for s in kept} and kept


@pytest.mark.parametrize("r", [1, 3, 8])
def test_a_pair_beside_the_layer(r):
    x, W, b, A, B = parts(r)
    y = F.linear(x, W, b).detach().requires_grad_()
    check(AddLowRank.apply, lambda x, y, A, B: y + x @ A.mT @ B.mT, (x, y, A, B))
    h = torch.bmm(A, x.mT).detach().requires_grad_()
    check(AddHidden.apply, lambda h, y, B: y + h.mT @ B.mT, (h, y, B))


@pytest.mark.parametrize("trained", [True, False], ids=["router", "given weights"])
def test_a_mixture(trained):
    x, _, _, A, B = parts(6)
    omega = draw(K, TOKENS, 3, seed=6, grad=trained)
    check(
        Mixture.apply,
        lambda omega, x, A, B: sum(
            omega[..., i : i + 1] * (x @ A[:, 2 * i : 2 * i + 2].mT @ B[..., 2 * i : 2 * i + 2].mT)
            for i in range(3)
        ),
        (omega, x, A, B),
    )


def test_a_mixture_keeps_its_inputs_alone():
    x, _, _, A, B = parts(6)
    given, kept = (draw(K, TOKENS, 3, seed=6), x, A, B), set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda s: kept.add(s.data_ptr()) or s, lambda s: s
    ):
        Mixture.apply(*given)
    assert kept == {v.data_ptr() for v in given}
