"""Forms that turn, rescale or replace the base, against plain loops and installed PEFT."""

import itertools
import math

import pytest
import torch
from torch import nn

from loralab import adapt
from loralab.core.quantize import (
    NF4_LEVELS,
    dequantize,
    dequantize_nf4,
    quantize,
    quantize_int8,
    quantize_nf4,
)
from loralab.errors import UserError
from loralab.methods import build
from loralab.methods.initialization.loftq import LoftQ, QuantizedLoRA
from loralab.methods.initialization.qpissa import QPiSSA
from loralab.methods.optimization._rotations import cayley, skew
from loralab.methods.optimization.boft import BOFT
from loralab.methods.optimization.glora import GLoRA
from loralab.methods.optimization.hra import HRA
from loralab.methods.optimization.ia3 import IA3
from loralab.methods.optimization.miss import MiSS
from loralab.methods.optimization.oft import OFT
from loralab.methods.optimization.road import RoAd
from loralab.methods.optimization.shira import MASKS, SHiRA
from loralab.recipe import Evidence, Site

M, N, R = 12, 8, 4


def site(name="layer", m=M, n=N, r=R):
    return Site(name, n, m, r)


def evidence(m=M, n=N, **more):
    g = torch.Generator().manual_seed(1)
    W, G = torch.randn(2, m, n, generator=g, dtype=torch.float64)
    return Evidence(W, 1.0, 3, "layer", gradient=G, **more)


def moved(form, place, ev=None):
    """Return the Form's tensors, floating ones off their start, and W' computed by the Form."""
    ev = ev or evidence(place.d_out, place.d_in)
    g = torch.Generator().manual_seed(2)
    t = form.init(place, ev)
    for name, v in t.items():
        if v.is_floating_point():
            t[name] = v + 0.3 * torch.randn(v.shape, generator=g, dtype=v.dtype)
    return t, form.base(t, ev.weight, place)


def skew_by_loops(theta, b):
    Q, i = torch.zeros(b, b, dtype=theta.dtype), 0
    for row, col in itertools.combinations(range(b), 2):
        Q[row, col], Q[col, row], i = theta[i], -theta[i], i + 1
    return Q


def cayley_by_inverse(Q):
    one = torch.eye(len(Q), dtype=Q.dtype)
    return (one + Q) @ torch.linalg.inv(one - Q)


def close(found, wanted, tol=1e-12):
    torch.testing.assert_close(found, wanted, rtol=tol, atol=tol)


# --- each formula by loops ---------------------------------------------------------------------


@pytest.mark.parametrize("share", [False, True])
def test_oft_is_w_times_a_transposed_block_diagonal_rotation(share):
    form = OFT(share=share, rescale=True)
    t, found = moved(form, site())
    blocks = [cayley_by_inverse(skew_by_loops(theta, 4)) for theta in t["theta"]]
    rotation = torch.block_diag(*(blocks * 2 if share else blocks))
    close(rotation @ rotation.T, torch.eye(N, dtype=torch.float64))
    assert torch.linalg.det(rotation) > 0
    # The paper's z = (R W0 D)ᵀ x with W0 [in, out].
    close(found, (rotation @ evidence().weight.T @ torch.diag(t["s"])).T)


def test_oft_series_nears_the_exact_map():
    t, exact = moved(OFT(), site())
    t = {"theta": t["theta"] * 0.3}
    W = evidence().weight
    exact = OFT().base(t, W, site())
    errors = [(OFT(neumann=k).base(t, W, site()) - exact).norm() for k in (1, 3, 9, 30)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-9 < errors[0]


def test_oft_takes_the_largest_block_that_divides():
    sizes = {}
    for r in (2, 3, 4, 5, 100):
        n_blocks, n_pairs = OFT().init(site(n=12, r=r), evidence(n=12))["theta"].shape
        sizes[r] = 12 // n_blocks
        assert n_pairs == sizes[r] * (sizes[r] - 1) // 2
    assert sizes == {2: 2, 3: 3, 4: 4, 5: 4, 100: 12}
    with pytest.raises(UserError, match="at least 2 inputs"):
        OFT().init(site(n=7), evidence(n=7))


@pytest.mark.parametrize(("n", "m_factors", "b"), [(16, 3, 4), (24, 2, 4), (16, 4, 2), (8, 1, 4)])
def test_boft_is_a_product_of_permuted_rotations(n, m_factors, b):
    form, place = BOFT(n_factors=m_factors), site(n=n, r=b)
    t, found = moved(form, place)
    assert t["theta"].shape == (m_factors, n // b, b * (b - 1) // 2)  # 1/2 (b - 1) d m in all
    h, rotation = b // 2, torch.eye(n, dtype=torch.float64)
    for level in range(1, m_factors + 1):
        k, component, used = 2**level, torch.zeros(n, n, dtype=torch.float64), 0
        for start in range(0, n // h, k):  # sub-blocks of a group, the first half with the second
            for j in range(k // 2):
                at = [(start + j) * h + i for i in range(h)]
                at += [(start + j + k // 2) * h + i for i in range(h)]
                block = cayley_by_inverse(skew_by_loops(t["theta"][level - 1, used], b))
                component[torch.tensor(at)[:, None], torch.tensor(at)] = block
                used += 1
        rotation = component @ rotation  # R = B̃(d, 2^m) ... B̃(d, 2)
    close(found, evidence(n=n).weight @ rotation.T)
    close(form.inner(t, evidence(n=n).weight, place), evidence(n=n).weight @ rotation)
    close(rotation @ rotation.T, torch.eye(n, dtype=torch.float64))
    assert (rotation != 0).all() == (m_factors == math.log2(2 * n / b))


def test_boft_gives_few_rows_what_it_gives_many():
    """Many rows pass a turned W, few are turned themselves."""
    model = torch.nn.Sequential(torch.nn.Linear(16, 12)).double()
    adapter = adapt(model, "boft", rank=4, rescale=True)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.linspace(-1, 1, p.numel()).view_as(p))
    x = torch.randn(24, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    many, few = model(x), torch.cat([model(row) for row in x.split(2)])
    close(many, few)
    assert not torch.equal(many, few), "both took the same way"


def test_boft_refuses_what_does_not_fit():
    with pytest.raises(UserError, match="even block b"):
        BOFT(n_factors=3).init(site(n=12), evidence(n=12))
    assert BOFT().init(site(n=12, r=4), evidence(n=12))["theta"].shape == (2, 6, 1)


def test_cayley_of_a_slot_does_not_see_a_diverged_one():
    fine = torch.linspace(-1, 1, 3)
    both = cayley(skew(torch.stack([fine, torch.full((3,), 1e20)]), 3))
    close(both[0], cayley(skew(fine, 3)))


def test_hra_is_the_chain_of_reflections_and_its_gradient():
    form, place, W = HRA(), site(r=6), evidence().weight
    t, found = moved(form, place)
    U, chain = t["U"].requires_grad_(), torch.eye(N, dtype=torch.float64)
    for i in range(6):
        u = U[:, i : i + 1] / U[:, i].norm()
        chain = chain @ (torch.eye(N, dtype=torch.float64) - 2 * u @ u.T)
    close(found, W @ chain)
    weights = torch.linspace(-1, 1, M * N, dtype=torch.float64).view(M, N)
    grads = [
        torch.autograd.grad((out * weights).sum(), U)[0]
        for out in (form.base({"U": U}, W, place), W @ chain)
    ]
    close(*grads)


def test_hra_starts_at_the_identity_exactly_and_moves():
    form, place = HRA(), site(r=6)
    U = form.init(place, evidence())["U"].float().requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, N).to(dtype)
        assert torch.equal(form.inner({"U": U.to(dtype)}, x, place), x)
    (grad,) = torch.autograd.grad(form.inner({"U": U}, torch.randn(5, N), place)[:, 0].sum(), U)
    assert (grad.abs().sum(0) > 0).all()
    with pytest.raises(UserError, match="odd rank 3"):
        form.init(site(r=3), evidence())


def test_hra_penalty_is_of_unit_vectors_and_can_be_left_out():
    t, _ = moved(HRA(), site())
    U = t["U"] / t["U"].norm(dim=0)
    wanted = sum((float(i == j) - U[:, i] @ U[:, j]) ** 2 for i in range(R) for j in range(R))
    close(HRA(lam=0.5).penalty(t, site()), 0.5 * wanted)
    assert HRA(lam=0.0).penalty(t, site()) is None


@pytest.mark.parametrize("name", ["layers.0.self_attn.k_proj", "layers.0.mlp.down_proj"])
def test_ia3_scales_keys_and_values_out_and_the_feed_forward_in(name):
    t, found = moved(IA3(), site(name))
    W, wanted = evidence().weight, torch.empty(M, N, dtype=torch.float64)
    for i in range(M):
        for j in range(N):
            wanted[i, j] = W[i, j] * t["l"][j if "mlp" in name else i]
    close(found, wanted)


@pytest.mark.parametrize("kind", ["lora", "vector", "constant", "none"])
def test_glora_shifts_the_bias_by_W_C_and_scales_it(kind):
    paths = {"path_C": "vector" if kind == "constant" else kind}
    paths |= {f"path_{n}": "constant" if kind == "lora" else kind for n in "DE"}
    form, W, b = GLoRA(**paths), evidence().weight, torch.randn(M, dtype=torch.float64)
    place = Site("layer", N, M, R, has_bias=True)
    t = {n: torch.randn_like(v) for n, v in form.init(place, evidence()).items()}
    found = form.bias({n: v[None] for n, v in t.items()} | {"W": W[None]}, b, place)
    wanted = b.clone()
    for i in range(M):
        if kind == "none":
            continue
        at = i if kind == "vector" else 0
        wanted[i] += t["D"][at] * b[i] + t["E"][at]
        for j in range(N):
            C = sum(t["C_d"][j, k] * t["C_u"][k, 0] for k in range(R)) if kind == "lora" else 0
            wanted[i] += W[i, j] * (C if kind == "lora" else t["C"][j])
    close(found.expand(1, -1)[0], wanted)
    assert not set("CDE") & {n[0] for n in form.init(site(), evidence())}


def test_coft_projects_every_block_on_its_ball():
    b, blocks, coft = R, N // R, 3e-3
    adapter = adapt(nn.Sequential(nn.Linear(N, M)), "oft", rank=b, coft=coft)
    optimizer = adapter.optimizer(lr=1e-2)
    for _ in range(6):
        x = torch.randn(5, N, generator=torch.Generator().manual_seed(0))
        adapter.model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    (_, bank) = next(adapter.pack.banks())
    radius = coft * b**2 / math.sqrt(blocks)
    norms = [skew_by_loops(theta, b).norm().item() for theta in bank.theta[0].detach().double()]
    assert norms == pytest.approx([radius] * blocks, rel=1e-5)
    free = adapt(nn.Sequential(nn.Linear(N, M)), "oft", rank=b)
    assert free.pack.slots[0].recipe.rule.coft is None


def test_ia3_matches_whole_parts_of_names():
    form = IA3(feedforward="c_proj, mlp.out")
    ends = {"h.0.mlp.c_proj": True, "c_proj": True, "h.0.xc_proj": False, "h.mlp.out": True}
    assert {name: form.scales_input(site(name)) for name in ends} == ends


@pytest.mark.parametrize("variant", [1, 2, 4])
@pytest.mark.parametrize("group", [2, 6])
def test_road_turns_pairs_of_outputs(variant, group):
    form = RoAd(variant=variant, group=group)
    t, found = moved(form, site())
    half, rotation = group // 2, torch.zeros(M, M, dtype=torch.float64)
    alpha, theta = t["alpha"], t["theta"]
    assert alpha.numel() + theta.numel() == variant * M
    for pair in range(M // 2):
        first = pair // half * group + pair % half
        second = first + half

        def at(row, sine, pair=pair, first=first, second=second):
            spot = pair if variant == 1 else (first, second)[row]
            spot = (int(sine), spot) if variant == 4 else spot
            return alpha[spot], theta[spot]

        for row, (me, other) in enumerate([(first, second), (second, first)]):
            a, angle = at(row, sine=False)
            rotation[me, me] = a * angle.cos()
            a, angle = at(row, sine=True)
            rotation[me, other] = (-1 if row == 0 else 1) * a * angle.sin()
    close(found, rotation @ evidence().weight)


@pytest.mark.parametrize("n", [8, 10])
@pytest.mark.parametrize("shards", ["inputs", "outputs"])
def test_miss_repeats_one_matrix(shards, n):
    form, place = MiSS(shards=shards), site(n=n)
    t = {"D": torch.randn(form.init(place, evidence(n=n))["D"].shape, dtype=torch.float64)}
    wanted = torch.empty(M, n, dtype=torch.float64)
    for i in range(M):
        for j in range(n):
            wanted[i, j] = t["D"][i, j % R] if shards == "inputs" else t["D"][i // (M // R), j]
    close(form.delta(t, place), wanted)
    x = torch.randn(3, n, dtype=torch.float64)
    close(form.branch(t, x, place), x @ wanted.T)
    packed = {"D": torch.stack([t["D"], 2 * t["D"]])}
    close(form.delta(packed, place), torch.stack([wanted, 2 * wanted]))
    close(form.branch(packed, x.expand(2, -1, -1), place)[1], 2 * x @ wanted.T)


@pytest.mark.parametrize("mask", MASKS)
def test_shira_trains_the_entries_that_its_mask_names(mask):
    ev, place = evidence(), site(r=2)
    t, _ = moved(SHiRA(mask=mask), place, ev)
    delta = SHiRA(mask=mask).delta(t, place)
    on, count = delta != 0, 2 * (M + N)
    score = {"wm": ev.weight, "grad": ev.gradient, "snip": ev.weight * ev.gradient}.get(mask)
    if score is not None:
        ranked = sorted(score.abs().flatten().tolist(), reverse=True)
        assert (on == (score.abs() >= ranked[count - 1])).all()
    if mask == "struct":
        assert on.diagonal().all() and on.sum() <= count
        assert sum(row.all() for row in on) == (count - N) // N
    else:
        assert on.sum() == count
    for k, place_k in enumerate(t["index"].tolist()):
        assert delta[place_k // N, place_k % N] == t["values"][k]
    two = {"index": t["index"].expand(2, -1), "values": torch.stack([t["values"], -t["values"]])}
    close(SHiRA().delta(two, place), torch.stack([delta, -delta]))


def test_shira_asks_for_a_gradient_only_if_its_mask_looks_at_one():
    assert {m for m in MASKS if SHiRA(mask=m).needs} == {"grad", "snip"}


@pytest.mark.parametrize("path_A", ["lora", "vector", "constant", "none"])
@pytest.mark.parametrize("path_B", ["lora", "vector", "constant", "none"])
def test_glora_scales_entry_by_entry_and_shifts(path_A, path_B):
    if path_A == path_B == "none":
        with pytest.raises(UserError, match="nothing to train"):
            GLoRA(path_A=path_A, path_B=path_B)
        return
    form, W = GLoRA(path_A=path_A, path_B=path_B), evidence().weight
    start = form.init(site(), evidence())
    t = {n: torch.randn_like(v) for n, v in start.items()}

    def entry(name, path, i, j):
        if path == "lora":
            return sum(t[f"{name}_d"][i, k] * t[f"{name}_u"][k, j] for k in range(R))
        return {"vector": lambda: t[name][i], "constant": lambda: t[name][0]}.get(path, float)()

    wanted = torch.tensor(
        [
            [W[i, j] * entry("A", path_A, i, j) + entry("B", path_B, i, j) for j in range(N)]
            for i in range(M)
        ]
    )
    close(
        form.delta(t | {"W": W[None]}, site())[0] if path_A != "none" else form.delta(t, site()),
        wanted,
    )
    assert not form.delta(start | {"W": W}, site()).any()


@pytest.mark.parametrize("method", ["oft", "boft", "hra", "ia3", "road"])
def test_a_small_turn_survives_a_bf16_base(method):
    """The tensors stay in fp32: rounding them as well would add a third to (IA)³'s error."""
    g, n = torch.Generator().manual_seed(0), 64
    model = nn.Sequential(nn.Linear(n, n, bias=False)).bfloat16()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(n, n, generator=g) / n**0.5)
        x = torch.randn(512, n, generator=g).bfloat16()
        base = model(x).double()
        adapter = adapt(model, method, rank=R)
        (_, bank), W = next(adapter.pack.banks()), model[0].weight.double()
        for name in bank.trained:
            value = getattr(bank, name)
            value.add_(0.02 * torch.randn(value.shape, generator=g))
        t = {key: v[0].double() for key, v in bank.tensors().items()}
        wanted = x.double() @ (bank.form.base(t, W, bank.site) - W).T
        assert (model(x).double() - base - wanted).norm() < 0.1 * wanted.norm()


# --- quantisation ------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2, 8, 64])
def test_nf4_takes_the_nearest_level_of_each_block(block):
    W = torch.randn(5, 7, dtype=torch.float64)
    codes, absmax = quantize_nf4(W, block)
    found = dequantize_nf4(codes, absmax, (5, 7))
    assert codes.dtype == torch.uint8 and codes.numel() == math.ceil(35 / block) * block // 2
    flat = W.flatten().tolist()
    for start in range(0, 35, block):
        part = flat[start : start + block]
        top = max(map(abs, part))
        for i, w in enumerate(part):
            best = min(NF4_LEVELS, key=lambda level: abs(level - w / top))
            assert found.flatten()[start + i].item() == pytest.approx(best * top, abs=1e-15)
    again = quantize_nf4(found, block)
    assert torch.equal(again[0], codes) and torch.equal(again[1], absmax)


def test_nf4_levels_are_the_quantiles_of_a_normal():
    """Appendix E of 2305.14314: 8 levels below and 9 above, 0 in common, scaled to ±1."""
    ppf, edge = torch.distributions.Normal(0.0, 1.0).icdf, 0.9677083
    above = ppf(torch.linspace(edge, 0.5, 9)[:-1])
    below = -ppf(torch.linspace(edge, 0.5, 8)[:-1])
    wanted = torch.cat([above, torch.zeros(1), below]).sort().values
    close(torch.tensor(NF4_LEVELS), wanted / wanted.max(), tol=1e-5)


def test_int8_is_within_half_a_step():
    W = torch.randn(6, 9, dtype=torch.float64)
    codes, absmax = quantize_int8(W)
    assert codes.dtype == torch.int8 and codes.abs().amax(-1).eq(127).all()
    error = (dequantize(codes, absmax, (6, 9)) - W).abs()
    assert (error <= absmax[:, None] / 254 * (1 + 1e-9)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_zeros_and_packs(bits):
    W = torch.randn(4, 16)
    W[1] = 0
    one, two = quantize(W, bits, 16), quantize(-3 * W, bits, 16)
    assert not dequantize(*one, (4, 16))[1].any()
    packed = dequantize(torch.stack([one[0], two[0]]), torch.stack([one[1], two[1]]), (4, 16))
    assert torch.equal(packed[0], dequantize(*one, (4, 16)))
    assert torch.equal(packed[1], dequantize(*two, (4, 16)))


def top(X, r):
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    return sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in range(r))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("start", [LoftQ, QPiSSA])
def test_the_alternation_follows_the_algorithms(start, T, bits):
    W, s = evidence().weight, 0.5
    q = lambda X: dequantize(*quantize(X, bits), (M, N))  # noqa: E731
    if start is LoftQ:
        pair = torch.zeros_like(W)
        for _ in range(T):
            Q = q(W - pair)
            pair = top(W - Q, R)
    else:
        Q = torch.zeros_like(W)
        for _ in range(T):
            pair = top(W - Q, R)
            Q = q(W - pair)
    t = start(bits=bits, n_iter=T).init(site(), Evidence(W, s, 0, "layer"))
    close(s * t["B"] @ t["A"], pair)
    close(QuantizedLoRA().base(t, W, site()), Q)
    # The point of both: nearer to W than its own codes.
    assert (Q + pair - W).norm() < (q(W) - W).norm()


def test_quantised_lora_by_itself_is_qlora():
    W = evidence().weight
    t = QuantizedLoRA().init(site(), evidence())
    close(QuantizedLoRA().base(t, W, site()), dequantize(*quantize_nf4(W, 64), (M, N)))
    assert not t["B"].any() and t["A"].abs().max() <= N**-0.5


def test_more_rounds_come_nearer():
    W = evidence(32, 48).weight
    for start in (LoftQ, QPiSSA):
        errors = []
        for T in (1, 5):
            t = start(n_iter=T).init(site(m=32, n=48), Evidence(W, 1.0, 0, "layer"))
            Q = QuantizedLoRA().base(t, W, site(m=32, n=48))
            errors.append((Q + t["B"] @ t["A"] - W).norm())
        assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build("loftq", bits=3), "bits of LoftQ cannot be 3; it is 4 or 8"),
        (lambda: build("lora", init="loftq"), "start LoftQ treats tensor absmax, codes apart"),
        (lambda: build("qpissa", n_iter=0), "n_iter of QPiSSA must be a whole number from 1"),
        (lambda: build("oft", neumann=-1), "neumann of OFT must be a whole number from 0 on"),
        (lambda: build("oft", coft=0.0), "coft of BallAdamW must be positive"),
        (lambda: build("boft", n_factors=0), "n_factors of BOFT must be a whole number from 1"),
        (lambda: build("hra", lam=-1.0), "lam of HRA must be at least 0, not -1.0"),
        (lambda: build("road", variant=3), "variant of RoAd cannot be 3; it is 1, 2 or 4"),
        (lambda: build("road", group=3), "group of RoAd must be an even number, not 3"),
        (lambda: build("miss", shards="rows"), "shards of MiSS .* 'inputs' or 'outputs'"),
        (lambda: build("shira", mask="rnd"), "mask of SHiRA cannot be 'rnd'; did you mean rand"),
        (lambda: build("glora", path_A="vectr"), "did you mean vector"),
        (lambda: RoAd(group=8).init(site(), evidence()), "does not divide the 12 outputs"),
    ],
)
def test_mistakes_get_one_sentence(call, words):
    with pytest.raises(UserError, match=words):
        call()


@pytest.mark.parametrize(
    "form", [OFT(), BOFT(), HRA(), IA3(), RoAd(), MiSS(), SHiRA(), GLoRA()], ids=repr
)
def test_alpha_has_no_say(form):
    assert form.scale(3.0, 8) == form.scale(100.0, 2) == 1.0


# --- installed PEFT ----------------------------------------------------------------------------


class One(nn.Module):
    def __init__(self, bias):
        super().__init__()
        g = torch.Generator().manual_seed(7)
        self.layer = nn.Linear(N, M, bias=bias)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * 0.5)

    def forward(self, x):
        return self.layer(x)


def theirs_and_ours(key, bias):
    """Return both adapted models with the same tensors, PEFT's moved off their start."""
    config, read, settings = peft_case(key)
    config.target_modules = ["layer"]
    torch.manual_seed(0)
    theirs = pytest.importorskip("peft").get_peft_model(One(bias), config).eval()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.3)
    ours = adapt(One(bias), key.split()[0], targets=["layer"], **({"rank": R} | settings))
    (_, bank), source = next(ours.pack.banks()), read(theirs.base_model.model.layer)
    assert set(source) == set(bank.names)
    with torch.no_grad():
        for name, value in source.items():
            getattr(bank, name).copy_(value.reshape(getattr(bank, name).shape))
    return theirs, ours


def agree(theirs, ours, tol=1e-5):
    x = torch.randn(3, 5, N, generator=torch.Generator().manual_seed(5)).requires_grad_()
    outs = [theirs(x), ours.model(x)]
    weights = torch.linspace(-1, 1, outs[0].numel()).view(outs[0].shape)
    grads = [torch.autograd.grad((y * weights).sum(), x)[0] for y in outs]
    torch.testing.assert_close(outs[1], outs[0], rtol=tol, atol=tol)
    torch.testing.assert_close(grads[1], grads[0], rtol=tol, atol=tol)
    merged = theirs.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(ours.merge()(x), merged(x), rtol=tol, atol=tol)


def same_gradients(theirs, ours, key):
    """PEFT's gradients, read as its tensors are, are ours."""
    bank, layer = next(ours.pack.banks())[1], theirs.base_model.model.layer
    x = torch.randn(3, 5, N, generator=torch.Generator().manual_seed(5))
    weights = torch.linspace(-1, 1, 15 * M).view(3, 5, M)
    named = [(n, p) for n, p in theirs.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad((theirs(x) * weights).sum(), [p for _, p in named])
    found = torch.autograd.grad(
        (ours.model(x) * weights).sum(), [getattr(bank, n) for n in bank.trained]
    )
    kept = [p.detach().clone() for _, p in named]
    with torch.no_grad():
        for (_, p), grad in zip(named, grads, strict=True):
            p.copy_(grad)
        told = peft_case(key)[1](layer)
        for name, grad in zip(bank.trained, found, strict=True):
            # PEFT's full matrix R of BOFT enters by (R - R^T) / 2: half of theta's gradient.
            factor = 2 if (key, name) == ("boft", "theta") else 1
            wanted = factor * told[name].reshape(grad[0].shape)
            torch.testing.assert_close(grad[0], wanted, rtol=1e-5, atol=1e-5, msg=name)
        for (_, p), value in zip(named, kept, strict=True):
            p.copy_(value)


def peft_case(key):
    """Return (PEFT's config, our method, tensors of PEFT's layer under our names, settings)."""
    peft = pytest.importorskip("peft")
    at = "default"
    masks = lambda layer: layer.shira_indices[at].long()  # noqa: E731
    return {
        "oft": (
            peft.OFTConfig(oft_block_size=R),
            lambda layer: {"theta": layer.oft_R[at].weight},
            {"neumann": 3},
        ),
        "oft shared": (
            peft.OFTConfig(oft_block_size=R, block_share=True),
            lambda layer: {"theta": layer.oft_R[at].weight},
            {"neumann": 3, "share": True},
        ),
        # Pinned: PEFT's exact Cayley map is ours with -Q.
        "oft exact": (
            peft.OFTConfig(oft_block_size=R, use_cayley_neumann=False),
            lambda layer: {"theta": -layer.oft_R[at].weight},
            {},
        ),
        # Pinned: -Q again; PEFT trains a full matrix and takes its skew part, and always rescales.
        "boft": (
            peft.BOFTConfig(boft_block_size=R, boft_n_butterfly_factor=1),
            lambda layer: {"theta": -upper(layer.boft_R[at]), "s": layer.boft_s[at]},
            {"n_factors": 1, "rescale": True},
        ),
        "hra": (peft.HRAConfig(r=R), lambda layer: {"U": layer.hra_u[at]}, {}),
        "ia3": (
            peft.IA3Config(feedforward_modules=[]),
            lambda layer: {"l": layer.ia3_l[at]},
            {"feedforward": ""},
        ),
        "ia3 feedforward": (
            peft.IA3Config(feedforward_modules=["layer"]),
            lambda layer: {"l": layer.ia3_l[at]},
            {"feedforward": "layer"},
        ),
        **{
            f"road {v}": (
                peft.RoadConfig(variant=f"road_{v}", group_size=6),
                lambda layer, v=v: {
                    "alpha": by_function(layer.road_alpha[at], v, 6),
                    "theta": by_function(layer.road_theta[at], v, 6),
                },
                {"variant": v, "group": 6},
            )
            for v in (1, 2, 4)
        },
        "miss": (peft.MissConfig(r=R), lambda layer: {"D": layer.miss_block[at].T}, {}),
        "miss short block": (
            peft.MissConfig(r=3),
            lambda layer: {"D": layer.miss_block[at].T},
            {"rank": 3},
        ),
        "shira": (
            peft.ShiraConfig(r=2, random_seed=0),
            lambda layer: {
                "index": masks(layer)[0] * N + masks(layer)[1],
                "values": layer.shira_weight[at],
            },
            {"rank": 2},
        ),
        "glora": (
            peft.GloraConfig(r=R),
            lambda layer: glora_paths(layer, at),
            {},
        ),
        "glora vector": (
            peft.GloraConfig(r=R, config_A_B="vector", config_C="vector", config_D_E="vector"),
            lambda layer: glora_paths(layer, at),
            {f"path_{name}": "vector" for name in "ABCDE"},
        ),
        "glora weight": (
            peft.GloraConfig(r=R, config_C="none", config_D_E="none"),
            lambda layer: glora_paths(layer, at),
            {f"path_{name}": "none" for name in "CDE"},
        ),
    }[key]


def upper(full):
    """Return the entries above the diagonal of the skew parts of [..., b, b]."""
    rows, cols = torch.triu_indices(full.shape[-1], full.shape[-1], 1)
    return (0.5 * (full - full.mT))[..., rows, cols]


def glora_paths(layer, at):
    """Return the trained tensors of all of PEFT's paths: "Xd" of path A is our A_d, "X" our A."""
    return {
        f"{path}{leaf[1:].replace('d', '_d').replace('u', '_u')}": value
        for path in "ABCDE"
        for leaf, value in getattr(layer, f"glora_{path}")[at].named_parameters()
    }


def by_function(flat, variant, group):
    """PEFT keeps RoAd4's cosines and sines side by side within each group."""
    return flat.view(-1, 2, group).transpose(0, 1).flatten(1) if variant == 4 else flat


CASES = ["oft", "oft shared", "oft exact", "boft", "hra", "ia3", "ia3 feedforward", "miss"]
CASES += ["road 1", "road 2", "road 4", "miss short block", "shira"]
CASES += ["glora", "glora vector", "glora weight"]


@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.filterwarnings("ignore:Failed to load the CUDA|Setting boft_n_butterfly_factor")
def test_same_tensors_same_output_as_peft(key, bias):
    theirs, ours = theirs_and_ours(key, bias)
    same_gradients(theirs, ours, key)
    agree(theirs, ours)


def test_boft_permutes_as_peft_does():
    """Without its CUDA extension PEFT runs m = 1 only; its permutations can be asked for m = 3."""
    pytest.importorskip("peft")
    from peft.tuners.boft.layer import BOFTLayer

    n, b, m = 16, 4, 3
    form, place = BOFT(n_factors=m), site(n=n, r=b)
    t, found = moved(form, place)
    rotation = torch.eye(n, dtype=torch.float64)
    for i in range(m):
        perm = BOFTLayer.block_butterfly_perm(None, n, n // b // 2**i, b // 2, m - 1)
        P = BOFTLayer.perm2mat(None, perm).double()
        blocks = [cayley_by_inverse(skew_by_loops(theta, b)) for theta in t["theta"][i]]
        rotation = P @ torch.block_diag(*blocks) @ P.T @ rotation
    close(found, evidence(n=n).weight @ rotation.T)


def test_pinned_difference_peft_hra_gram_schmidt_does_not_start_at_the_base():
    peft = pytest.importorskip("peft")
    config = peft.HRAConfig(r=R, apply_GS=True, target_modules=["layer"])
    model, x = peft.get_peft_model(One(False), config), torch.randn(2, N)
    with torch.no_grad():
        assert not (model(x) - One(False)(x)).norm() < 0.1


def test_qpissa_quantises_the_residual_that_peft_makes():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=R, lora_alpha=6.0, init_lora_weights="pissa", target_modules=["layer"]
    )
    layer = peft.get_peft_model(One(False), config).base_model.model.layer
    W = One(False).layer.weight.detach()
    t = QPiSSA(n_iter=1).init(site(), Evidence(W, 6.0 / R, 0, "layer"))
    residual = layer.base_layer.weight.detach()
    found = dequantize(t["codes"], t["absmax"], (M, N))
    wanted = dequantize(*quantize_nf4(residual), (M, N))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    pair = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(t["B"] @ t["A"], pair, rtol=1e-5, atol=1e-5)


def test_loftq_round_is_peft_s_split_of_the_residual():
    """Pinned: PEFT leaves s = alpha / r out of the split, so s B A overshoots unless s = 1."""
    pytest.importorskip("peft")
    from peft.utils.loftq_utils import _low_rank_decomposition

    W = evidence().weight
    rest = W - dequantize(*quantize_nf4(W), (M, N))
    split = _low_rank_decomposition(rest, reduced_rank=R)
    for s in (1.0, 2.0):
        t = LoftQ(n_iter=1).init(site(), Evidence(W, s, 0, "layer"))
        close(s * t["B"] @ t["A"], split["L"] @ split["R"])
