"""The starts, rules and schedules of the catalogue against formulas written again in numpy."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from loralab.core.pack import Pack, SlotSpec
from loralab.core.stopgrad import stop_gradient, stops
from loralab.errors import UserError
from loralab.methods import all_methods, build, get
from loralab.methods.initialization._svd import fast_svd
from loralab.recipe import Evidence, Hyper, Site, SiteState
from loralab.training.adamw import AdamW
from loralab.training.optimizer import PackOptimizer

M, N, R = 12, 20, 4
SITE = Site("layer", N, M, R)


def evidence(scale=1.0, seed=0, m=M, n=N):
    draw = np.random.default_rng(1)
    W, G = draw.normal(size=(2, m, n))
    return Evidence(torch.tensor(W), scale, seed, "layer", torch.tensor(G))


def start(name, e, site=SITE, **settings):
    t = build(name, **settings).start.init(site, e)
    return t["A"].numpy(), t["B"].numpy()


def fake(t, site=SITE):
    s = SiteState()
    s.site, s.t, s.state, s.g = site, t, {}, {}
    s.scale = torch.ones(len(next(iter(t.values()))), dtype=torch.float64)
    return s


def hyper(lr, decay=0.0, k=1):
    return Hyper(*(torch.full((k,), x, dtype=torch.float64) for x in (lr, decay)))


# Starts


def test_lora_and_init_ab_draw_within_their_bounds():
    big = Site("layer", 400, 300, 16)
    e = Evidence(torch.zeros(300, 400), 1.0, 0, "layer")
    t = get("lora").recipe.form.init(big, e)
    assert t["A"].shape == (16, 400) and t["B"].shape == (300, 16)
    assert not t["B"].any()
    assert 0.99 < float(t["A"].abs().max()) * math.sqrt(400) <= 1
    assert abs(float(t["A"].var()) * 400 * 3 - 1) < 0.05
    for gamma in (1.0, 16.0):
        A, B = start("init_ab", e, big, gamma=gamma)
        for x in (A, B):
            assert 0.99 < np.abs(x).max() * math.sqrt(400) / gamma <= 1 + 1e-6
    assert build("init_ab").departs and not build("init_ab", anchored=True).departs


def test_draws_depend_on_seed_and_site_and_not_on_dtype():
    form = get("lora").recipe.form

    def draw(seed=0, name="layer", dtype=torch.float64):
        return form.init(SITE, Evidence(torch.zeros(M, N, dtype=dtype), 1.0, seed, name))["A"]

    assert torch.equal(draw(), draw())
    assert not torch.equal(draw(), draw(seed=1)) and not torch.equal(draw(), draw(name="other"))
    assert torch.equal(draw().float(), draw(dtype=torch.float32))


@pytest.mark.parametrize("shape", [(M, N), (N, M)])
@pytest.mark.parametrize("scale", [1.0, 0.5, 3.0])
def test_pissa_and_milora_split_the_weight_whatever_the_scale(shape, scale):
    m, n = shape
    e, site = evidence(scale, m=m, n=n), Site("layer", n, m, R)
    U, S, Vh = np.linalg.svd(e.weight.numpy())
    top = sum(S[i] * np.outer(U[:, i], Vh[i]) for i in range(R))
    bottom = sum(S[i] * np.outer(U[:, i], Vh[i]) for i in range(len(S) - R, len(S)))
    for name, part in (("pissa", top), ("milora", bottom)):
        A, B = start(name, e, site)
        np.testing.assert_allclose(scale * B @ A, part, atol=1e-10)
        # The singular values are shared evenly: A Aᵀ = BᵀB.
        np.testing.assert_allclose(A @ A.T, B.T @ B, atol=1e-10)


def test_fast_svd_finds_the_leading_part_and_repeats_itself():
    e = evidence()
    A, B = start("pissa", e, niter=12)
    U, S, Vh = np.linalg.svd(e.weight.numpy())
    np.testing.assert_allclose(B @ A, (U[:, :R] * S[:R]) @ Vh[:R], atol=1e-6)
    A2, B2 = start("pissa", e, niter=12)
    assert (A == A2).all() and (B == B2).all()
    assert not build("pissa").start.seeded and build("pissa", niter=4).start.seeded
    U, S, Vh = fast_svd(e.weight, N, 1, e.generator("sketch"))  # more than the matrix has
    assert U.shape == (M, M)


@pytest.mark.parametrize("shape", [(M, N), (N, M)])
def test_olora_is_the_head_of_a_qr_decomposition(shape):
    m, n = shape
    A, B = start("olora", evidence(2.0, m=m, n=n), Site("layer", n, m, R))
    W = evidence(m=m, n=n).weight.numpy()
    assert A.shape == (R, n) and B.shape == (m, R)
    np.testing.assert_allclose(B.T @ B, np.eye(R), atol=1e-10)
    np.testing.assert_allclose((B @ A)[:, :R], W[:, :R], atol=1e-10)  # R is upper triangular
    np.testing.assert_allclose(A, B.T @ W, atol=1e-10)


@pytest.mark.parametrize("niter", [None, 30])
def test_lora_ga_takes_scaled_singular_vectors_of_the_gradient(niter):
    e = evidence()
    U, _, Vh = np.linalg.svd(e.gradient.numpy())
    factor = M**0.25 / math.sqrt(16)
    for split, rows, columns in (
        ("ArB2r", range(R), range(R, 2 * R)),
        ("A2rBr", range(R, 2 * R), range(R)),
        ("ArBr", range(1, 2 * R, 2), range(0, 2 * R, 2)),
    ):
        A, B = start("lora_ga", e, split=split, niter=niter)
        # Up to the sign of each singular vector.
        np.testing.assert_allclose(np.abs(A @ Vh[list(rows)].T), factor * np.eye(R), atol=1e-6)
        np.testing.assert_allclose(np.abs(B.T @ U[:, list(columns)]), factor * np.eye(R), atol=1e-6)


def test_lora_ga_names_the_layer_that_is_too_small():
    site = Site("blocks.0.q", N, M, 7)
    with pytest.raises(UserError, match=r"rank 7 is too large for layer blocks\.0\.q .*at most 6"):
        build("lora_ga").start.init(site, evidence())
    with pytest.raises(UserError, match="give `data`"):
        build("lora_ga").start.init(SITE, Evidence(torch.zeros(M, N), 1.0, 0, "layer"))


def test_lora_ga_first_step_follows_the_gradient():
    """The first SGD step of B A is a descent direction, and closer to G than LoRA's own is."""
    e = evidence()
    G = e.gradient.numpy()

    def overlap(A, B):
        step = B @ B.T @ G + G @ A.T @ A
        return (step * G).sum() / np.linalg.norm(step) / np.linalg.norm(G)

    lora = get("lora").recipe.form.init(SITE, e)
    ga = overlap(*start("lora_ga", e))
    assert ga > 0.8 > overlap(lora["A"].numpy(), lora["B"].numpy()) > 0


# Forms


def test_scales():
    cases = {"lora": (8, 1.0), "rslora": (16, 4.0), "lora_alpha": (1024, 64.0), "full": (16, 1.0)}
    for name, (alpha, scale) in cases.items():
        form = get(name).recipe.form
        rank = 8 if name == "lora" else 16
        assert form.default_alpha(rank) == alpha
        assert form.scale(form.default_alpha(rank), rank) == scale
    assert get("rslora").recipe.form.scale(8, 4) == 4.0
    assert get("lora_ga").recipe.form == get("rslora").recipe.form


def test_dora_gain_and_its_stopped_norm():
    e = evidence()
    e.weight[3] = 0  # a row of zeros must not give 0/0
    form = get("dora").recipe.form
    m = form.init(SITE, e)["m"]
    np.testing.assert_allclose(m, np.sqrt((e.weight.numpy() ** 2).sum(1)), rtol=1e-12)
    norm = (m.clone() * 2)[None].requires_grad_()
    t = {"m": m[None].clone().requires_grad_()}
    expected = np.where(np.arange(M) == 3, 0, 0.5)
    np.testing.assert_allclose(form.gain(t, norm).detach()[0], expected)
    form.gain(t, norm).sum().backward()
    assert norm.grad is None and bool((t["m"].grad[0, :3] > 0).all())
    with stops(kept=False) as seen:
        form.gain(t, norm).sum().backward()
    assert seen.n_met == 1 and bool((norm.grad[0, :3] < 0).all())
    build("dora", detach_norm=False).form.gain(t, norm.detach().requires_grad_()).sum().backward()


def test_stops_count_and_restore():
    x = torch.ones(1, requires_grad=True)
    with stops() as outer:
        assert not stop_gradient(x).requires_grad
        with stops(kept=False) as inner:
            assert stop_gradient(x).requires_grad
        assert not stop_gradient(x).requires_grad
    assert (outer.n_met, inner.n_met) == (3, 1)
    assert not stop_gradient(x).requires_grad


def test_full_is_dense_and_starts_at_the_base():
    form = get("full").recipe.form
    t = form.init(SITE, evidence())
    assert t["D"].shape == (M, N) and not t["D"].any()
    D = torch.randn(2, M, N, dtype=torch.float64)
    x = torch.randn(2, 3, N, dtype=torch.float64)
    expected = torch.einsum("kmn,kbn->kbm", D, x)
    torch.testing.assert_close(form.branch({"D": D}, x, SITE), expected)


# Rules


def pair(seed=0, k=1, r=R, m=M, n=N):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(k, r, n, generator=g, dtype=torch.float64)
    return {"A": A, "B": torch.randn(k, m, r, generator=g, dtype=torch.float64)}


def gradients(t, step):
    g = torch.Generator().manual_seed(100 + step)
    return {n: torch.randn(x.shape, generator=g, dtype=x.dtype) for n, x in sorted(t.items())}


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("rule", "ratio"), [(AdamW(), 1.0), (build("lora_plus").rule, 16.0)])
def test_adamw_and_lora_plus_equal_torch(rule, ratio, decay):
    t = {**pair(), "m": torch.ones(1, M, dtype=torch.float64)}
    reference = {n: x.clone().requires_grad_() for n, x in t.items()}
    lr = 1e-2
    optimizer = torch.optim.AdamW(
        [{"params": [x], "lr": lr * (ratio if n == "B" else 1)} for n, x in reference.items()],
        weight_decay=decay,
    )
    site = fake(t)
    for step in range(5):
        site.g = gradients(t, step)
        for n, x in reference.items():
            x.grad = site.g[n].clone()
        optimizer.step()
        rule.step([site], hyper(lr, decay))
    for n, x in reference.items():
        torch.testing.assert_close(t[n], x.detach(), rtol=1e-10, atol=1e-12)


def test_lora_fa_freezes_a_alone():
    rule = build("lora_fa").rule
    assert not rule.trains("A") and rule.trains("B") and rule.trains("m")
    build("multilora", rule="lora_fa")
    with pytest.raises(UserError, match="the form has no pair"):
        build("multilora", rule="lora_fa", project=True)


def naive_loft(A, B, G, lr, decay, steps, eps=1e-4, b1=0.9, b2=0.999):
    """LoFT-AdamW for one site, with the full gradient G(step) of W and loops over rows."""
    m_len, r = B.shape
    n_len = A.shape[1]
    mB, mA = np.zeros_like(B), np.zeros_like(A)
    PB, PA = np.zeros((m_len, r, r)), np.zeros((n_len, r, r))
    A_old, B_old = A.copy(), B.copy()
    for k in range(1, steps + 1):
        gB, gA = G(k) @ A.T, B.T @ G(k)
        SA = np.linalg.inv(A @ A.T + 1e-8 * np.eye(r))
        SB = np.linalg.inv(B.T @ B + 1e-6 * np.eye(r))
        gB, gA = gB @ SA, SB @ gA
        CA, CB = A_old @ A.T @ SA, SB @ B.T @ B_old
        mB, mA = b1 * mB @ CA + (1 - b1) * gB, b1 * CB @ mA + (1 - b1) * gA
        for i in range(m_len):
            PB[i] = b2 * CA.T @ PB[i] @ CA + (1 - b2) * np.outer(gB[i], gB[i])
        for j in range(n_len):
            PA[j] = b2 * CB @ PA[j] @ CB.T + (1 - b2) * np.outer(gA[:, j], gA[:, j])
        A_old, B_old = A.copy(), B.copy()
        f1, f2 = 1 - b1**k, 1 - b2**k
        if k % 2:
            v = np.array([[A[:, j] @ PB[i] @ A[:, j] for j in range(n_len)] for i in range(m_len)])
            full = (mB @ A / f1) / (np.sqrt(v / f2) + eps)
            B = B * (1 - lr * decay) - lr * full @ A.T @ SA
        else:
            v = np.array([[B[i] @ PA[j] @ B[i] for j in range(n_len)] for i in range(m_len)])
            full = (B @ mA / f1) / (np.sqrt(v / f2) + eps)
            A = A * (1 - lr * decay) - lr * SB @ B.T @ full
    return A, B


def run_loft(t, G, lr, decay, steps, rule=None):
    site = fake(t)
    for k in range(1, steps + 1):
        full = torch.as_tensor(G(k))
        site.g = {"A": site.t["B"].mT @ full, "B": full @ site.t["A"].mT}
        (rule or build("loft").rule).step([site], hyper(lr, decay, len(t["A"])))
    return site


def test_loft_equals_a_naive_transcription():
    def G(k):
        return np.random.default_rng(k).normal(size=(M, N))

    for zero_B in (False, True):
        t = pair()
        if zero_B:
            t["B"].zero_()
        A, B = naive_loft(t["A"][0].numpy().copy(), t["B"][0].numpy().copy(), G, 0.05, 0.1, 6)
        run_loft(t, G, 0.05, 0.1, 6)
        np.testing.assert_allclose(t["A"][0], A, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(t["B"][0], B, rtol=1e-7, atol=1e-9)


def test_loft_at_full_rank_is_adamw_on_the_weight():
    """The paper's claim; it holds only if the second moment is carried as Rᵀ P R."""
    n, lr = 5, 0.05
    target = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def distance(as_coded):
        t = pair(1, r=n, m=n, n=n)
        W = (t["B"] @ t["A"])[0].clone().requires_grad_()
        optimizer = torch.optim.AdamW([W], lr=lr, eps=1e-4, weight_decay=0.0)
        rule = build("loft", damping_a=0.0, damping_b=0.0, as_coded=as_coded).rule
        site = fake(t, Site("layer", n, n, n))
        for _ in range(8):
            G = (t["B"] @ t["A"]) - target
            site.g = {"A": t["B"].mT @ G, "B": G @ t["A"].mT}
            rule.step([site], hyper(lr))
            W.grad = (W - target).detach()
            optimizer.step()
        return float((t["B"] @ t["A"] - W.detach()).abs().max())

    assert distance(False) < 1e-8 < 1e-3 < distance(True)


def test_loft_slots_are_independent_and_a_rate_of_zero_stands_still():
    t = pair(2, k=3)
    t["B"][1] = math.nan
    alone = {n: x[:1].clone() for n, x in t.items()}
    still = {n: x[2].clone() for n, x in t.items()}
    rates = torch.tensor([0.01, 0.01, 0.0], dtype=torch.float64)
    site, one = fake(t), fake(alone)
    rule = build("loft").rule
    for step in range(4):
        site.g = gradients(t, step)
        one.g = {n: x[:1] for n, x in site.g.items()}
        site.g["B"][2, 0, 0] = math.inf
        rule.step([site], Hyper(rates, torch.zeros(3).double()))
        rule.step([one], hyper(0.01))
    for n in t:
        torch.testing.assert_close(t[n][:1], alone[n], rtol=1e-9, atol=1e-12)
        assert torch.equal(t[n][2], still[n])


def test_loft_gives_other_tensors_plain_adamw():
    t = {**pair(), "m": torch.ones(1, M, dtype=torch.float64)}
    lone = {"m": t["m"].clone()}
    site, rest = fake(t), fake(lone)
    for step in range(3):
        site.g = gradients(t, step)
        rest.g = {"m": site.g["m"]}
        build("loft").rule.step([site], hyper(0.01))
        AdamW(eps=1e-4).step([rest], hyper(0.01))
    assert torch.equal(t["m"], lone["m"])


def test_every_rule_leaves_a_slot_at_rate_zero_alone():
    e = evidence()
    G = e.gradient
    e = dataclasses.replace(e, covariance=G.T @ G, gradient_covariance=G @ G.T)
    for method in all_methods().values():
        form, rule = method.recipe.form, method.recipe.rule
        own = {n: torch.stack([x] * 2) for n, x in form.init(SITE, e).items()}
        t = {n: x for n, x in own.items() if n not in form.frozen and rule.trains(n)}
        for n, noise in gradients(t, 5).items():
            t[n].add_(noise)
        before = {n: x.clone() for n, x in t.items()}
        site = fake(t)
        site.fixed = {n: x for n, x in own.items() if n not in t}
        for step in range(2):
            site.g = gradients(t, step)
            rates = torch.tensor([0.0, 0.1], dtype=torch.float64)
            rule.step([site], Hyper(rates, torch.full((2,), 0.1).double()))
        assert all(torch.equal(x[0], before[n][0]) for n, x in t.items()), method.name
        assert not t or any(not torch.equal(x[1], before[n][1]) for n, x in t.items()), method.name


# Schedules


class Restarting(SiteState):
    def __init__(self):
        k = torch.Generator().manual_seed(0)
        self.counts = []
        self.state = {
            "steps": torch.ones(2),
            "m.A": torch.randn(2, 10, 20, generator=k),
            "v.m": torch.ones(2, 3),
        }

    def restart(self, count):
        self.counts.append(count)


@pytest.mark.parametrize("n_steps", [7, 20, 23, 100])
def test_relora_restarts_evenly_and_never_at_the_end(n_steps):
    schedule, site, at = build("relora").schedule, Restarting(), []
    for step in range(n_steps):
        before = len(site.counts)
        schedule.after_step([site], step, n_steps)
        at += [step] * (len(site.counts) - before)
    phase = math.ceil(n_steps / 5)
    assert [s + 1 for s in at] == list(range(phase, n_steps, phase))
    assert site.counts == list(range(1, len(at) + 1)) and 3 <= len(at) <= 4


def test_relora_warms_up_again_after_each_restart_only():
    schedule = build("relora", every=20, warmup=4).schedule
    factors = [schedule.lr_factor(step, 60) for step in range(60)]
    ramp = [0.0, 0.25, 0.5, 0.75] + [1.0] * 16
    assert factors == [1.0] * 20 + ramp + ramp
    assert build("relora", every=4, warmup=10).schedule.lr_factor(5, 60) == 0.5
    assert build("relora", every=1, warmup=0).schedule.lr_factor(5, 60) == 1.0


def test_relora_keeps_the_largest_hundredth_of_the_memory_per_slot():
    site = Restarting()
    before = {n: x.clone() for n, x in site.state.items()}
    build("relora", every=5).schedule.after_step([site], 4, 10)
    for slot in range(2):
        old, new = before["m.A"][slot].flatten(), site.state["m.A"][slot].flatten()
        kept = new != 0
        assert int(kept.sum()) == 2 and torch.equal(new[kept], old[kept])
        assert float(old[kept].abs().min()) >= float(old[~kept].abs().max())
    assert torch.equal(site.state["v.m"], before["v.m"])
    assert torch.equal(site.state["steps"], before["steps"])
    build("relora", every=5, memory="zero").schedule.after_step([site], 4, 10)
    assert not any(bool(x.any()) for x in site.state.values())


def test_relora_keeps_no_first_moment_without_its_second():
    site, draw = Restarting(), torch.Generator().manual_seed(1)
    site.state |= {"v.A": torch.rand(2, 10, 20, generator=draw), "m.B": torch.ones(2, 4, 4)}
    before = {n: x.clone() for n, x in site.state.items()}
    build("relora", every=5, prune=0.5).schedule.after_step([site], 4, 10)
    m, v = site.state["m.A"], site.state["v.A"]
    for slot in range(2):
        size, square = before["m.A"][slot].abs(), before["v.A"][slot]
        both = (size > size.median()) & (square > square.median())
        assert torch.equal(m[slot] != 0, both) and int((v[slot] != 0).sum()) == 100
    assert int(site.state["m.B"][0].sum()) == 8, "a Rule may have a first moment alone"


@pytest.mark.parametrize("recipe", [build("lora"), build("pissa"), build("dora", init="pissa")])
def test_a_restart_changes_the_factors_and_not_the_function(recipe):
    model = torch.nn.Sequential(torch.nn.Linear(8, 6)).double()
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pack = Pack(model, [SlotSpec(recipe, rank=2, targets=("0",))])
    optimizer = PackOptimizer(pack, n_steps=10)

    def run():
        with pack.rows([5]):
            return model(x)

    for step in range(3):
        optimizer.zero_grad()
        run().square().sum().backward()
        optimizer.collect()
        optimizer.step(torch.full((1,), 0.1), torch.zeros(1), step)
    before, factors = run().detach(), optimizer.groups[0].states[0].t["B"].clone()
    optimizer.groups[0].states[0].restart(1)
    torch.testing.assert_close(run().detach(), before, rtol=1e-12, atol=1e-12)
    assert not torch.equal(optimizer.groups[0].states[0].t["B"], factors)
    pack.close()
