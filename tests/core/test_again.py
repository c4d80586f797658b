"""What backward runs again has the gradients of what is kept, and only its inputs are kept."""

import torch

from loralab.core.again import InRows, again


def hook(t, x, site):
    return ((x @ t["A"].mT).tanh() * t["frozen"]).sin() @ t["B"].mT


def tensors(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = {"A": (2, 3, 4), "frozen": (2, 1, 3), "B": (2, 5, 3), "x": (2, 6, 4)}
    t = {n: torch.randn(s, generator=g, dtype=dtype) for n, s in shapes.items()}
    return {n: v.requires_grad_(n != "frozen") for n, v in t.items()}


def test_first_and_second_derivatives():
    t = tensors()

    def run(A, B, x):
        return again(hook, {"A": A, "frozen": t["frozen"], "B": B}, x, None)

    inputs = (t["A"], t["B"], t["x"])
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_autograd_keeps_the_inputs_alone():
    t = tensors()
    x, kept = t.pop("x"), set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda s: kept.add(s.data_ptr()) or s, lambda s: s
    ):
        y = again(hook, t, x, None)
    assert kept == {v.data_ptr() for v in (*t.values(), x)}
    assert torch.equal(y, hook(t, x, None))


def test_a_gradient_comes_back_in_rows():
    """A hook that takes x's transpose leaves its gradient in columns."""
    x, A = torch.randn(2, 6, 4, requires_grad=True), torch.randn(2, 3, 4)
    seen = []
    for given in (x, InRows.apply(x)):
        y = given * 1.0
        y.register_hook(lambda g: seen.append(g.is_contiguous()))
        (A @ (y if given is x else InRows.apply(y)).mT).sum().backward()
    assert seen == [False, True]
