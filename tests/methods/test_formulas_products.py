"""Products other than B A against the papers' formulas in loops, and against installed PEFT."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from loralab import adapt
from loralab.errors import UserError
from loralab.methods import build
from loralab.methods.optimization.aurora import b_splines
from loralab.methods.optimization.loran import LoRANOutput
from loralab.recipe import Evidence, OwnStart, Site

SHAPES = [(12, 18, 2), (18, 12, 2), (10, 10, 4), (7, 9, 3)]
LEADS = [(), (3,), (2, 2)]


def setting(form, shape, lead=(), seed=0):
    """Return a site, W, tensors at a generic point and inputs, in fp64."""
    m, n, r = shape
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    site, W = Site("s", n, m, r), draw(m, n)
    t = {
        name: draw(*lead, *v.shape) if v.is_floating_point() else v.expand(*lead, *v.shape)
        for name, v in form.init(site, Evidence(W, 1.0, 0, "s")).items()
    }
    return site, W, t, draw(*lead, 5, n)


def slot(t, index):
    """Return one slot's tensors as numpy."""
    return {name: v[index].numpy() for name, v in t.items()}


def kron(t, W, settings):
    """Entry ((a b), (c d)) of P ⊗ Q is P_ac Q_bd."""
    P, Q = t["C"], t["D"] if "D" in t else t["B"] @ t["A"]
    if settings.get("low_rank") == "small":
        P, Q = Q, P
    D = np.zeros(W.shape)
    for i in range(D.shape[0]):
        for j in range(D.shape[1]):
            a, b = divmod(i, Q.shape[0])
            c, d = divmod(j, Q.shape[1])
            D[i, j] = P[a, c] * Q[b, d]
    return D


def hira(t, W, settings):
    D = np.zeros(W.shape)
    for i in range(D.shape[0]):
        for j in range(D.shape[1]):
            D[i, j] = W[i, j] * sum(t["B"][i, k] * t["A"][k, j] for k in range(len(t["A"])))
    return D


def circulant(t, W, settings):
    """Eq. 4: each row of a block is the one above it, shifted to the right."""
    w = t["w"] if settings.get("divide") is False else t["w"] / W.shape[1]
    return np.block([[np.array([np.roll(v, k) for k in range(len(v))]) for v in row] for row in w])


def fourier(t, W, settings):
    """Eqs. 2 to 4 as a double sum over the trained frequencies."""
    (m, n), D = W.shape, np.zeros(W.shape)
    for c, at in zip(t["c"], t["entries"], strict=True):
        j, k = divmod(int(at), n)
        for p in range(m):
            for q in range(n):
                D[p, q] += c * math.cos(2 * math.pi * (p * j / m + q * k / n)) / (m * n)
    return D


def haar(t, W, settings):
    """R_mᵀ S R_n with the rows of R the Haar filters, averages first."""
    S = np.zeros(W.shape)
    S.reshape(-1)[t["entries"]] = t["c"]
    if settings.get("idwt") is False:
        return S
    m, n = (size + size % 2 for size in W.shape)
    padded = np.zeros((m, n))
    padded[: W.shape[0], : W.shape[1]] = S

    def R(size):
        rows = np.zeros((size, size))
        for i in range(size // 2):
            rows[i, 2 * i : 2 * i + 2] = [2**-0.5, 2**-0.5]
            rows[size // 2 + i, 2 * i : 2 * i + 2] = [2**-0.5, -(2**-0.5)]
        return rows

    # The quadrant right of the averages is the high-pass along the rows' index (pywt's cH).
    h, w = m // 2, n // 2
    padded[:h, w:], padded[h:, :w] = padded[h:, :w].copy(), padded[:h, w:].copy()
    return (R(m).T @ padded @ R(n))[: W.shape[0], : W.shape[1]]


def delora(t, W, settings):
    D, r = np.zeros(W.shape), len(t["A"])
    for i in range(r):
        b, a = t["B"][:, i], t["A"][i]
        length = math.sqrt(sum(b * b)) * math.sqrt(sum(a * a))
        D += t["bound"][0] / r * np.outer(b, a * t["norm"]) / length
    return D


def mixer(t, W, settings):
    M = t["M"] if "M" in t else t["G"]
    r = len(M)
    return sum(M[i, j] * np.outer(t["B"][:, i], t["A"][j]) for i in range(r) for j in range(r))


def sine(t, W, settings):
    Z = t["B"] @ t["A"]
    return np.vectorize(math.sin)(settings.get("omega", 200.0) * Z) / math.sqrt(W.shape[1])


def loran(t, W, settings):
    Z = t["B"] @ t["A"]
    return Z + np.sin(Z) * Z


DENSE = {
    "lokr": (kron, {}),
    "lokr factor": (kron, {"factor": 2}),
    "lokr small": (kron, {"low_rank": "small"}),
    "hira": (hira, {}),
    "c3a": (circulant, {}),
    "c3a block": (circulant, {"block": 1, "divide": False}),
    "fourierft": (fourier, {"n": 6}),
    "waveft": (haar, {"n": 9}),
    "waveft sparse": (haar, {"n": 9, "idwt": False}),
    "delora": (delora, {}),
    "delora frobenius": (delora, {"norm": "frobenius"}),
    "moslora": (mixer, {}),
    "flora_core": (mixer, {}),
    "sinelora": (sine, {"omega": 3.0}),
    "loran": (loran, {}),
}


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", DENSE)
def test_dense_update_and_branch_equal_the_loops(case, shape, lead):
    oracle, settings = DENSE[case]
    form = build(case.split()[0], **settings).form
    site, W, t, x = setting(form, shape, lead)
    seen = t | {"W": W[(None,) * len(lead)]} if form.reads else t
    D, y = form.delta(seen, site), form.branch(seen, x, site)
    assert D.shape == (*lead, *W.shape)
    for index in np.ndindex(lead):
        wanted = oracle(slot(t, index), W.numpy(), settings)
        np.testing.assert_allclose(D[index].numpy(), wanted, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(y[index].numpy(), x[index].numpy() @ wanted.T, atol=1e-11)


def basis(u, j, order):
    """The B-spline of `order` with knots j, j + 1, ... at u, by its recursive definition."""
    if order == 0:
        return float(j <= u < j + 1)
    left = (u - j) / order * basis(u, j, order - 1)
    return left + (j + order + 1 - u) / order * basis(u, j + 1, order - 1)


def aurora(t, x):
    z = t["A"] @ x
    u = [(v + 1) / 0.4 + 3 for v in z]
    s = [sum(basis(v, j, 3) for v in u) for j in range(8)]
    return t["B"] @ (np.tanh(t["W_p"] @ np.tanh(z)) + t["W_s"] @ np.array(s))


def loda(t, x):
    leaky = lambda v: np.where(v > 0, v, 0.8 * v)  # noqa: E731
    f1 = leaky(t["M2"] @ leaky(t["M1"] @ leaky(t["A"] @ x)))
    return t["B"] @ (t["A"] @ x) + leaky(t["B"] @ f1)


def cera(t, x):
    z = t["A"] @ x
    return t["B"] @ (z / (1 + np.exp(-z)))


def loran_output(t, x):
    z = t["B"] @ (t["A"] @ x)
    return z + np.sin(z) * z


PATHS = {
    "aurora": (build("aurora").form, aurora),
    "loda": (build("loda").form, loda),
    "cera": (build("cera").form, cera),
    "loran output": (LoRANOutput(), loran_output),
}


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("case", PATHS)
def test_non_linear_paths_equal_the_loops(case, lead):
    form, oracle = PATHS[case]
    site, _, t, x = setting(form, (12, 10, 4), lead)
    y = form.branch(t, 0.3 * x, site)
    for index in np.ndindex(lead):
        wanted = [oracle(slot(t, index), 0.3 * row) for row in x[index].numpy()]
        np.testing.assert_allclose(y[index].numpy(), np.array(wanted), rtol=1e-9, atol=1e-12)


def test_splines_are_a_partition_of_unity_on_the_grid_and_vanish_far_off():
    z = torch.linspace(-0.999, 0.999, 50, dtype=torch.float64)
    torch.testing.assert_close(b_splines(z, 5, 3).sum(-1), torch.ones_like(z))
    assert not b_splines(torch.tensor([-2.3, 2.3]), 5, 3).any()


def test_cera_starts_from_kaiming_normal():
    W = torch.zeros(6, 500, dtype=torch.float64)
    t = build("cera").form.init(Site("s", 500, 6, 40), Evidence(W, 1.0, 0, "s"))
    assert t["A"].std().item() == pytest.approx((2 / 500) ** 0.5, rel=0.02) and not t["B"].any()


def test_cera_drops_features_in_training_only():
    form, n = build("cera", p=0.25).form, 4000
    site, _, t, x = setting(form, (12, 10, 4))
    mask = form.draw(site, n, torch.Generator().manual_seed(0))["mask"].double()
    assert mask.shape == (n, 4) and mask.unique().tolist() == pytest.approx([0, 4 / 3])
    assert mask.mean().item() == pytest.approx(1, abs=0.02)
    wanted = (torch.nn.functional.silu(x @ t["A"].T) * mask[:5]) @ t["B"].T
    torch.testing.assert_close(form.branch(t | {"mask": mask[:5]}, x, site), wanted)


def test_cera_draws_while_training_and_not_in_evaluation():
    model = nn.Sequential(nn.Linear(8, 8))
    adapter = adapt(model, "cera", rank=4, p=0.5)
    with torch.no_grad():
        next(adapter.pack.banks())[1].B.fill_(1.0)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("size", "factor", "wanted"),
    [
        (4096, None, (64, 64)),
        (12, None, (3, 4)),
        (4096, 32, (32, 128)),
        (13, None, (1, 13)),
        (360, None, (18, 20)),
    ],
)
def test_lokr_splits_near_the_root(size, factor, wanted):
    assert build("lokr", factor=factor).form.split(size) == wanted


def test_lokr_is_of_high_rank_with_few_numbers():
    form = build("lokr").form
    site, _, t, _ = setting(form, (36, 36, 2))
    assert {n: tuple(v.shape) for n, v in t.items()} == {"C": (6, 6), "A": (2, 6), "B": (6, 2)}
    assert torch.linalg.matrix_rank(form.delta(t, site)) == 12


def test_delora_is_bounded_whatever_the_factors():
    """|dW| <= λ |W| for the scalar norm (eq. 7), and scaling a or b changes nothing."""
    form = build("delora", norm="frobenius").form
    site, W, t, _ = setting(form, (12, 10, 4))
    t = t | {"norm": W.norm().view(1), "bound": torch.tensor([0.5], dtype=torch.float64)}
    D = form.delta(t, site)
    assert D.norm() <= 0.5 * W.norm()
    torch.testing.assert_close(form.delta(t | {"A": 7 * t["A"], "B": t["B"] / 3}, site), D)


def test_delora_zero_vectors_have_finite_gradients():
    form = build("delora").form
    site, _, t, x = setting(form, (12, 10, 4))
    t = {n: v.clone().requires_grad_(n != "norm") for n, v in t.items()}
    zero = t | {"B": torch.zeros_like(t["B"]).requires_grad_()}
    form.branch(zero, x, site).sum().backward()
    assert all(
        v.grad is not None and v.grad.isfinite().all() for n, v in zero.items() if n != "norm"
    )


def test_moslora_mixers():
    site = Site("s", 10, 12, 4)
    evidence = Evidence(torch.ones(12, 10, dtype=torch.float64), 1.0, 0, "s")
    M = build("moslora", mixer="orthogonal").form.init(site, evidence)["M"]
    torch.testing.assert_close(M @ M.T, torch.eye(4, dtype=torch.float64))
    M = build("moslora").form.init(site, evidence)["M"]
    assert 0 < M.abs().max() <= 0.5


def test_spectra_have_the_same_places_in_layers_of_one_size():
    """E is shared over layers in FourierFT; it changes with the seed."""
    form, W = build("fourierft", n=20).form, torch.ones(12, 10)
    places = lambda name, seed: form.init(  # noqa: E731
        Site(name, 10, 12, 4), Evidence(W, 1.0, seed, name)
    )["entries"].tolist()
    assert places("a", 0) == places("b", 0) != places("a", 1)
    assert len(set(places("a", 0))) == 20


@pytest.mark.parametrize(
    ("method", "own"), [("c3a", {"init_w": "xavier"}), ("fourierft", {"init_c": "normal"})]
)
def test_linear_forms_start_anywhere_on_request(method, own):
    """The papers' random starts; dW is linear, so the difference from it is what zero gives."""
    form = build(method, **own).form
    site = Site("s", 10, 12, 4)
    t = form.init(site, Evidence(torch.ones(12, 10, dtype=torch.float64), 1.0, 0, "s"))
    assert form.delta(t, site).norm() > 0
    name = {"c3a": "w", "fourierft": "c"}[method]
    step = torch.randn(t[name].shape, dtype=torch.float64)
    moved = form.delta(t | {name: t[name] + step}, site) - form.delta(t, site)
    torch.testing.assert_close(moved, form.delta(t | {name: step}, site))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build("lokr", factor=0), "factor of LoKr must be a whole number from 1 on"),
        (
            lambda: build("lokr", low_rank="big"),
            "low_rank of LoKr cannot be 'big'; .* 'large' or 'small'",
        ),
        (lambda: build("c3a", init_w="one"), "init_w of C3A cannot .* 'xavier' or 'zero'"),
        (lambda: build("c3a", block=0), "block of C3A"),
        (lambda: adapt(nn.Sequential(nn.Linear(8, 12)), "c3a", block=5), "8 inputs and 12 outputs"),
        (lambda: build("fourierft", n=0), "n of FourierFT"),
        (lambda: build("fourierft", init_c="x"), "init_c of FourierFT .* 'normal' or 'zero'"),
        (lambda: build("waveft", n=0), "n of WaveFT"),
        (lambda: build("delora", bound=0.0), "bound of DeLoRA must be positive"),
        (lambda: build("delora", norm="row"), "norm of DeLoRA .* 'column' or 'frobenius'"),
        (lambda: build("moslora", mixer="eye"), "mixer of MoSLoRA .*'kaiming' or 'orthogonal'"),
        (lambda: build("sinelora", omega=0.0), "omega of SineLoRA"),
        (lambda: build("sinelora", g=-1.0), "g of SineLoRA"),
        (lambda: build("loda", slope=2.0), "slope of LoDA"),
        (lambda: build("aurora", grid=0), "grid of AuroRA must be a whole number from 1 on"),
        (lambda: build("aurora", order=-1), "order of AuroRA must be a whole number from 0 on"),
        (lambda: build("aurora", noise=-0.1), "noise of AuroRA must be at least 0"),
        (lambda: build("cera", p=1.0), "p of CeRA"),
    ],
)
def test_mistakes_get_one_sentence(call, words):
    with pytest.raises(UserError, match=words):
        call()


R, ALPHA = 4, 6.0
PEFT_SHAPES = [(8, 12), (12, 8), (64, 36)]


class One(nn.Module):
    def __init__(self, n, m):
        super().__init__()
        g = torch.Generator().manual_seed(7)
        self.layer = nn.Linear(n, m)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)

    def forward(self, x):
        return self.layer(x)


def peft_lokr(layer):
    full = {"C": layer.lokr_w1, "D": layer.lokr_w2, "B": layer.lokr_w2_a, "A": layer.lokr_w2_b}
    return {n: v["default"] for n, v in full.items() if "default" in v}


def peft_spectrum(prefix, indices):
    def read(layer):
        row, column = getattr(layer, indices)["default"]
        c = getattr(layer, f"{prefix}_spectrum")["default"]
        return {"c": c, "entries": row * layer.in_features + column}

    return read


def peft_delora(layer):
    names = {"A": layer.delora_A, "B": layer.delora_B, "bound": layer.delora_lambda}
    return {n: v["default"] for n, v in names.items()} | {"norm": layer.delora_w_norm["default"]}


# Ours, with the settings for PEFT's defaults; PEFT's class, its config; PEFT's tensors by our names
PEFT = {
    "lokr": ({}, "LoKrConfig", {"r": R, "alpha": ALPHA}, peft_lokr),
    "hira": (
        {"alpha": R},
        "HiraConfig",
        {"r": R},
        lambda y: {"A": y.hira_A["default"], "B": y.hira_B["default"]},
    ),
    "c3a": (
        {"alpha": R, "block": 4},
        "C3AConfig",
        {"block_size": 4},
        lambda y: {"w": y.c3a_kernel["default"]},
    ),
    "fourierft": (
        {"n": 20, "init_c": "zero"},
        "FourierFTConfig",
        {"n_frequency": 20, "scaling": ALPHA},
        peft_spectrum("fourierft", "indices"),
    ),
    "waveft": (
        {"n": 20},
        "WaveFTConfig",
        {"n_frequency": 20, "scaling": ALPHA},
        peft_spectrum("waveft", "waveft_indices"),
    ),
    "waveft sparse": (
        {"n": 20, "idwt": False},
        "WaveFTConfig",
        {"n_frequency": 20, "scaling": ALPHA, "use_idwt": False},
        peft_spectrum("waveft", "waveft_indices"),
    ),
    # The form alone: PEFT subtracts no first value (see the pinned difference below).
    "delora": (
        {"alpha": R, "init": OwnStart()},
        "DeloraConfig",
        {"r": R, "delora_lambda": 3},
        peft_delora,
    ),
}


def twins(case, shape):
    """Return PEFT's model, its layer, our adapter with the same tensors, and the reader."""
    peft = pytest.importorskip("peft")
    settings, config, more, read = PEFT[case]
    config = getattr(peft, config)(target_modules=["layer"], **more)
    theirs = peft.get_peft_model(One(*shape), config)
    layer, g = theirs.base_model.model.layer, torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.3)
    ours = adapt(One(*shape), case.split()[0], **({"rank": R, "alpha": ALPHA} | settings))
    bank, source = next(ours.pack.banks())[1], read(layer)
    with torch.no_grad():
        assert set(bank.names) == set(source)
        for name, value in source.items():
            getattr(bank, name).copy_(value[None])
    return theirs, layer, ours, read


@pytest.mark.parametrize("shape", PEFT_SHAPES, ids=str)
@pytest.mark.parametrize("case", PEFT)
def test_same_tensors_as_peft_same_output_gradients_and_merged_weight(case, shape):
    theirs, layer, ours, read = twins(case, shape)
    bank = next(ours.pack.banks())[1]
    x = torch.randn(3, 5, shape[0], generator=torch.Generator().manual_seed(1), requires_grad=True)
    leaves = [p for p in theirs.parameters() if p.requires_grad]
    found = []
    for model, wanted in ((ours.model, [getattr(bank, n) for n in bank.trained]), (theirs, leaves)):
        y = model(x)
        weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
        found.append((y, torch.autograd.grad((y * weights).sum(), [x, *wanted])))
    (y, ours_grads), (y2, their_grads) = found
    torch.testing.assert_close(y, y2, rtol=1e-5, atol=1e-5)
    merged = ours.merge().layer.weight.detach().clone()
    theirs.merge_adapter()
    torch.testing.assert_close(merged, layer.get_base_layer().weight.detach(), rtol=1e-5, atol=1e-5)
    # Known difference: PEFT's own backward of C3A takes another matrix than the transposed one.
    right = case != "c3a"
    dx = torch.linspace(-1, 1, y.numel()).view(y.shape) @ merged
    torch.testing.assert_close(ours_grads[0], dx, rtol=1e-5, atol=1e-5)
    assert torch.allclose(their_grads[0], dx, rtol=1e-5, atol=1e-5) == right
    with torch.no_grad():
        for p, grad in zip(leaves, their_grads[1:], strict=True):
            p.copy_(grad)
    for name, grad in zip(bank.trained, ours_grads[1:], strict=True):
        torch.testing.assert_close(grad[0], read(layer)[name], rtol=1e-5, atol=1e-5, msg=name)


def test_pinned_differences_of_starts():
    """PEFT zeroes LoKr's C and DeLoRA's B."""
    peft = pytest.importorskip("peft")

    def start(name, **more):
        config = getattr(peft, name)(target_modules=["layer"], **more)
        return peft.get_peft_model(One(64, 36), config).base_model.model.layer

    lokr = start("LoKrConfig", r=2)
    assert not lokr.lokr_w1["default"].any() and lokr.lokr_w2_b["default"].any()
    assert not start("DeloraConfig", r=2).delora_B["default"].any()
    theirs = start("FourierFTConfig").fourierft_spectrum["default"]
    assert float(theirs.detach().std()) == pytest.approx(1, abs=0.1)
    names = ("lokr", "delora", "fourierft")
    ours = {n: next(adapt(One(64, 36), n, rank=2).pack.banks())[1] for n in names}
    assert float(ours["fourierft"].c.detach().std()) == pytest.approx(1, abs=0.1)
    assert ours["lokr"].C.any() and not ours["lokr"].A.any()
    assert ours["delora"].B.any() and ours["delora"].anchored


def test_lokr_splits_as_peft_does():
    """PEFT's own factorisation gives our split for every size, unless f divides above the root."""
    factorization = pytest.importorskip("peft.tuners.lokr.layer").factorization
    form = build("lokr").form
    assert all(form.split(n) == factorization(n) for n in range(1, 400))
    assert dataclasses.replace(form, factor=8).split(24) == (4, 6) != factorization(24, 8)
