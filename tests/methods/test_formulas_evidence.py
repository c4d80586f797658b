"""Methods that look at data first, or at held-out data, against their formulas written in loops."""

import math
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from loralab import adapt
from loralab.errors import UserError
from loralab.methods import build, get
from loralab.methods.budgeting.ralora import adalomo_step, effective_rank
from loralab.recipe import Evidence, Site, SiteState

M, N, R = 8, 16, 4
SITE = Site("layer", N, M, R)


def evidence(m=M, n=N, seed=0, scale=1.0, tokens=60):
    """Return evidence in fp64 with input and output-gradient moments of full rank."""
    draw = np.random.default_rng(seed)
    W, G = draw.normal(size=(2, m, n))
    X = draw.normal(size=(tokens, n)) @ draw.normal(size=(n, n))
    Y = draw.normal(size=(tokens, m)) @ draw.normal(size=(m, m))
    moments = (torch.tensor(X.T @ X / tokens), torch.tensor(Y.T @ Y / tokens))
    return Evidence(torch.tensor(W), scale, 0, "layer", torch.tensor(G), *moments)


def many():
    """Return sites of other sizes with their evidence by name."""
    shapes = [(8, 16), (16, 8), (12, 12), (8, 8)]
    sites = [Site(f"s{i}", n, m, R, layer=i, n_layers=4) for i, (m, n) in enumerate(shapes)]
    return sites, {s.name: evidence(s.d_out, s.d_in, 3 + i) for i, s in enumerate(sites)}


def ranks(name, **settings):
    sites, found = many()
    return build(name, **settings).start.ranks(sites, lambda s: found[s.name])


class State(SiteState):
    """One site without a model; `resize` and `renew` do what the pack's do."""

    def __init__(self, site, form, k=2):
        self.site, self.form, self.state, self.g, self.seeds = site, form, {}, {}, list(range(k))
        self.put(site)

    def put(self, site):
        made = [self.form.init(site, Evidence(torch.zeros(M, N), 1.0, k, "x")) for k in self.seeds]
        own = {n: torch.stack([t[n] for t in made]) for n in made[0]}
        self.t = {n: t for n, t in own.items() if n not in self.form.frozen}
        self.fixed = {n: t for n, t in own.items() if n in self.form.frozen}

    def renew(self, count):
        self.put(self.site)

    def resize(self, index):
        self.site = Site(self.site.name, N, M, index.shape[-1])
        self.put(self.site)


# GoRA


def loop_ranks(importance, sites, least, most, weigh, rounded):
    total, found = sum(importance.values()), {}
    budget = sum(weigh(s.d_in + s.d_out) * s.rank for s in sites)
    for s in sites:
        r = rounded(budget * importance[s.name] / total / weigh(s.d_in + s.d_out))
        r = max(round(least * s.rank), min(round(most * s.rank), r))
        found[s.name] = min(r, s.d_in, s.d_out)
    return found


@pytest.mark.parametrize(
    "name,smoothing,weigh,rounded",
    [
        ("gora", "sqrt", math.sqrt, round),
        ("gora", "none", float, math.floor),  # as in the authors' scripts
        ("ralora_pro", "sqrt", math.sqrt, math.floor),
        ("ralora_pro", "none", float, math.floor),
    ],
)
def test_ranks_follow_the_mean_of_weight_times_gradient(name, smoothing, weigh, rounded):
    sites, found = many()
    importance = {}
    for s in sites:
        W, G, total = found[s.name].weight, found[s.name].gradient, 0.0
        for i in range(s.d_out):
            for j in range(s.d_in):
                total += abs(float(W[i, j] * G[i, j]))
        importance[s.name] = total / (s.d_out * s.d_in)
    wanted = loop_ranks(importance, sites, 0.5, 4.0, weigh, rounded)
    assert ranks(name, smoothing=smoothing) == wanted
    assert len(set(wanted.values())) > 1


def test_gora_ranks_are_bounded_and_a_dead_gradient_keeps_those_asked_for():
    sites, found = many()
    e = found["s0"]
    loud = Evidence(e.weight, 1.0, 0, "s0", 1e6 * e.gradient)
    start = build("gora").start
    got = start.ranks(sites, lambda s: loud if s.name == "s0" else found[s.name])
    assert got == {"s0": 8, "s1": 2, "s2": 2, "s3": 2}  # 8 is the smaller side
    dead = {
        s.name: Evidence(found[s.name].weight, 1.0, 0, "", 0 * found[s.name].gradient)
        for s in sites
    }
    assert start.ranks(sites, lambda s: dead[s.name]) is None


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_gora_compresses_minus_the_gradient(scale):
    """s B0 A0 is -γ √(n/r) G P with P the projector on A0's rows, whatever the scale."""
    e = evidence(scale=scale)
    t = build("gora").start.init(SITE, e)
    A, B, G = t["A"].numpy(), t["B"].numpy(), e.gradient.numpy()
    Q, _ = np.linalg.qr(A.T)
    wanted = -0.05 * math.sqrt(N / R) * G @ Q @ Q.T
    np.testing.assert_allclose(scale * B @ A, wanted, rtol=1e-9, atol=1e-12)
    # In the paper's letters: ξ = γ √n / α with α = s √r.
    xi = 0.05 * math.sqrt(N) / (scale * math.sqrt(R))
    np.testing.assert_allclose(B, -xi * G @ A.T @ np.linalg.inv(A @ A.T), rtol=1e-9)
    assert np.sum(scale * (B @ A) * G) < 0, "the first step must descend"
    assert not build("gora").start.anchored and build("gora", anchored=True).start.anchored


# RaLoRA


def test_effective_rank_is_the_exponential_of_the_entropy():
    G = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0]))
    entropy = -sum(p * math.log(p) for p in (0.5, 0.25, 0.125, 0.125))
    assert effective_rank(G) == pytest.approx(math.exp(entropy))
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1)
    assert effective_rank(torch.zeros(3, 3)) == 1


@pytest.mark.parametrize(
    "rank,n_max,n", [(1, 32, 4), (2, 32, 2), (1, 2, 2), (4, 32, 1), (8, 32, 1)]
)
def test_number_of_blocks(rank, n_max, n):
    """The effective rank is 5 of at most 8: 2^⌊log2(5 / r)⌋ blocks within 1 and n_max."""
    G = torch.zeros(M, N, dtype=torch.float64)
    G[range(5), range(5)] = 1.0
    e = Evidence(torch.zeros(M, N, dtype=torch.float64), 1.0, 0, "layer", G)
    t = build("ralora", n_max=n_max).form.init(Site("layer", N, M, rank), e)
    assert t["n"].tolist() == [n]
    assert t["A"].shape == (rank, N) and t["B"].shape == (M, rank)
    assert float(t["A"].abs().max()) <= (N / n) ** -0.5


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_ralora_is_block_diagonal_with_full_rank_blocks(n):
    form, g = build("ralora").form, torch.Generator().manual_seed(n)
    A, B = torch.randn(R, N, generator=g).double(), torch.randn(M, R, generator=g).double()
    t = {"A": A, "B": B, "n": torch.tensor([float(n)])}
    p, q = N // n, M // n
    wanted = np.zeros((M, N))
    for i in range(n):
        inputs, outputs = range(i * p, (i + 1) * p), range(i * q, (i + 1) * q)
        for row in outputs:
            for column in inputs:
                wanted[row, column] = sum(B[row, k] * A[k, column] for k in range(R))
    np.testing.assert_allclose(form.delta(t, SITE), wanted, rtol=1e-12)
    assert np.linalg.matrix_rank(wanted) == min(n * R, M)
    x = torch.randn(2, 5, N, generator=g).double()
    packed = {name: torch.stack([v, v]) for name, v in t.items()}
    np.testing.assert_allclose(
        form.branch(packed, x, SITE), x.numpy() @ wanted.T, rtol=1e-10, atol=1e-12
    )


def test_ralora_slots_with_other_numbers_of_blocks_share_a_pack():
    form, g = build("ralora").form, torch.Generator().manual_seed(0)
    t = {"A": torch.randn(2, R, N, generator=g), "B": torch.randn(2, M, R, generator=g)}
    t["n"] = torch.tensor([[2.0], [8.0]])
    x = torch.randn(2, 3, N, generator=g)
    y = form.branch(t, x, SITE)
    for k in range(2):
        alone = form.branch({name: v[k : k + 1] for name, v in t.items()}, x[k : k + 1], SITE)
        torch.testing.assert_close(y[k : k + 1], alone)


def test_dralora_takes_adalomos_first_step():
    e = evidence()
    W, G = e.weight.numpy(), e.gradient.numpy()
    row, column = (G**2).mean(1), (G**2).mean(0)
    U = np.zeros_like(G)
    for i in range(M):
        for j in range(N):
            U[i, j] = G[i, j] / math.sqrt(row[i] / row.mean() * column[j])
    size = math.sqrt((W**2).mean())
    wanted = -size * U / max(1.0, math.sqrt((U**2).mean()))
    np.testing.assert_allclose(adalomo_step(e), wanted, rtol=1e-9)
    sites, found = many()
    norms = {s.name: float(adalomo_step(found[s.name]).norm()) for s in sites}
    assert ranks("dralora") == loop_ranks(norms, sites, 0.5, 4.0, float, math.floor)
    t = build("dralora").form.init(Site("layer", N, M, 1), e)
    assert float(t["n"]) == 2 ** math.floor(math.log2(effective_rank(torch.tensor(wanted))))


# EVA


@pytest.mark.parametrize("ratio", ["explained", "printed"])
def test_eva_gives_the_ranks_to_the_directions_that_explain_most(ratio):
    sites, found = many()
    everything = []
    for s in sites:
        variance = np.linalg.eigvalsh(found[s.name].covariance.numpy())[::-1]
        sigma = np.sqrt(variance)
        below = variance.sum() if ratio == "explained" else sigma.sum()
        for j in range(min(2 * R, s.d_in, s.d_out)):
            everything.append((variance[j] / below, s.name))
    best = sorted(everything, reverse=True)[: R * len(sites)]
    wanted = {s.name: sum(name == s.name for _, name in best) for s in sites}
    got = ranks("eva", ratio=ratio)
    assert got == wanted and sum(got.values()) == R * len(sites)
    assert max(got.values()) <= 2 * R and len(set(got.values())) > 1
    assert ranks("eva", rho=1.0) is None


def test_eva_starts_along_the_inputs_and_at_the_base():
    e = evidence()
    t = build("eva").start.init(SITE, e)
    assert not t["B"].any()
    np.testing.assert_allclose(t["A"] @ t["A"].T, np.eye(R), atol=1e-12)
    values = np.linalg.eigvalsh(e.covariance.numpy())[::-1][:R]
    np.testing.assert_allclose((t["A"] @ e.covariance @ t["A"].T), np.diag(values), atol=1e-9)


class One(nn.Module):
    def __init__(self, n=N, m=M):
        super().__init__()
        g = torch.Generator().manual_seed(7)
        self.layer = nn.Linear(n, m)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)

    def forward(self, x):
        return self.layer(x)


def inputs(tokens=64, decay=0.6):
    """Return [tokens, N] with a spread spectrum and mean 0."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(tokens // 2, N, generator=g) * decay ** torch.arange(N)
    return torch.cat([x, -x]) @ torch.linalg.qr(torch.randn(N, N, generator=g)).Q


def every_token(x, *_):
    return x[0] if isinstance(x, tuple) else x


def pefts_eva(x):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=R,
        target_modules=["layer"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0, use_label_mask=False),
    )
    found = peft.tuners.lora.eva.get_eva_state_dict(
        One(),
        [x],
        config,
        forward_fn=lambda model, batch: model(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=every_token,
        show_progress_bar=False,
    )
    return found["layer"].float()


def test_eva_equals_peft_on_centred_inputs_and_the_mean_is_the_difference():
    x = inputs()
    start = build("eva").start

    def ours(x):
        e = Evidence(torch.zeros(M, N), 1.0, 0, "layer", None, x.T @ x / len(x))
        return start.init(SITE, e)["A"]

    torch.testing.assert_close(ours(x), pefts_eva(x), rtol=1e-5, atol=1e-5)
    moved = x + 5.0
    torch.testing.assert_close(ours(moved - moved.mean(0)), pefts_eva(moved), rtol=1e-5, atol=1e-5)
    assert (ours(moved) - pefts_eva(moved)).abs().max() > 0.1


def chain():
    """Return layers whose inputs have no mean, which PEFT would take away."""
    model = nn.Sequential(One(), One(M, N), One())
    for block in model:
        nn.init.zeros_(block.layer.bias)
    return model


def eva_on_chain(**settings):
    loss = lambda model, x: model(x).square().mean()  # noqa: E731
    adapter = adapt(chain(), "eva", rank=R, alpha=6.0, data=[inputs()], loss=loss, **settings)
    return [(bank.site.rank, bank.scale.item()) for _, bank in adapter.pack.banks()]


def test_eva_keeps_the_scale_of_the_rank_asked_for():
    """LoRAFactory divides alpha by the rank that EVA gives, and so weighs the layers again."""
    found = eva_on_chain(rank_pattern={"1.layer": 2}, alpha_pattern={"2.layer": 10.0})
    assert [scale for _, scale in found] == [6.0 / R, 6.0 / 2, 10.0 / R]
    assert found[1][0] != 2 and found[2][0] != R


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_eva_gives_the_ranks_and_scales_of_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=R,
        lora_alpha=6.0,
        target_modules=["layer"],
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, use_label_mask=False),
    )
    theirs = peft.get_peft_model(chain(), config)
    peft.initialize_lora_eva_weights(
        theirs,
        [inputs()],
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=every_token,
        show_progress_bar=False,
    )
    layers = [block.layer for block in theirs.base_model.model]
    wanted = [(layer.r["default"], layer.scaling["default"]) for layer in layers]
    assert eva_on_chain(ratio="explained") == wanted == [(5, 1.5), (4, 1.5), (3, 1.5)]


# PRILoRA


def test_prilora_ranks_rise_linearly_and_keep_their_mean():
    sites = [Site(str(i), 64, 64, 8, layer=i, n_layers=12) for i in range(12)]
    got = list(build("prilora").start.ranks(sites, None).values())
    assert got[0] == 4 and got[-1] == 12 and got == sorted(got)
    assert sum(got) / 12 == pytest.approx(8, abs=0.1)
    assert build("prilora").start.ranks([Site("x", 64, 64, 8)], None) == {"x": 8}


def test_prilora_prunes_the_least_weight_times_input_of_each_row():
    recipe = build("prilora", every=3, share=0.25)
    e = evidence()
    t = recipe.form.init(SITE, e)
    np.testing.assert_allclose(t["x"] ** 2, np.diag(e.covariance))
    site = State(SITE, recipe.form, k=1)
    site.t["A"], site.fixed["x"] = t["A"][None].clone(), t["x"][None]
    for step in range(2):
        recipe.schedule.after_step([site], step, 100)
    assert torch.equal(site.t["A"][0], t["A"])
    recipe.schedule.after_step([site], 2, 100)
    for i in range(R):
        importance = [abs(float(t["A"][i, j] * t["x"][j])) for j in range(N)]
        least = sorted(range(N), key=importance.__getitem__)[: N // 4]
        for j in range(N):
            assert float(site.t["A"][0, i, j]) == (0.0 if j in least else float(t["A"][i, j]))


# AutoLoRA and DiffoRA


def test_autolora_weighs_rank_one_parts_by_a_softmax():
    form, g = build("autolora").form, torch.Generator().manual_seed(0)
    t = form.init(SITE, evidence())
    t["B"], t["alpha"] = (
        torch.randn(M, R, generator=g).double(),
        torch.randn(R, generator=g).double(),
    )
    weights = [math.exp(a) for a in t["alpha"]]
    wanted = np.zeros((M, N))
    for j in range(R):
        wanted += weights[j] / sum(weights) * np.outer(t["B"][:, j], t["A"][j])
    np.testing.assert_allclose(form.delta(t, SITE), wanted, rtol=1e-10)
    assert build("autolora").rule.held_out == {"alpha"}


def searched(recipe, sites, step=4):
    for site in sites:
        site.scale = torch.ones(2)
    recipe.schedule.after_step(sites, step, 10)


def test_even_the_shortest_search_ends():
    recipe = build("autolora", search=0.01)
    site = State(SITE, recipe.form)
    searched(recipe, [site], step=0)
    assert not site.fixed["searching"].any()


def test_autolora_starts_the_chosen_ranks_anew_without_weights():
    recipe = build("autolora")
    site = State(SITE, recipe.form)
    site.t["alpha"].copy_(torch.tensor([[0.0, 3.0, 0.0, 0.0], [3.0, 0.0, 0.0, 3.0]]))
    site.state["m.A"] = torch.ones(2, R, N)
    searched(recipe, [site], step=3)
    assert site.fixed["searching"].all() and recipe.schedule.ranks([site])[0].tolist() == [4, 4]
    searched(recipe, [site])
    assert site.t["A"].shape == (2, 2, N) and not site.t["B"].any()
    assert site.t["A"].any(-1).tolist() == [[True, False], [True, True]]
    assert recipe.schedule.ranks([site])[0].tolist() == [1, 2]
    assert not site.fixed["searching"].any() and not site.state["m.A"].any()
    site.t["B"].normal_()
    t = site.t | site.fixed
    B, A = t["B"][0, :, :1], t["A"][0, :1]
    torch.testing.assert_close(recipe.form.delta(t, site.site)[0], B @ A)


def test_autolora_keeps_every_rank_while_all_weigh_the_same():
    recipe = build("autolora")
    for rank in range(1, 8):
        site = State(Site("layer", N, M, rank), recipe.form)
        searched(recipe, [site])
        assert site.t["A"].any(-1).all() and site.t["A"].shape == (2, rank, N)


def test_diffora_keeps_the_best_modules_of_each_layer():
    recipe = build("diffora")
    sites = [
        State(Site(f"{layer}.{j}", N, M, R, layer=layer, n_layers=2), recipe.form)
        for layer in range(2)
        for j in range(4)
    ]
    scores = torch.tensor([[3, 1, 2, 0, 0, 1, 2, 3], [0, 1, 2, 3, 3, 2, 1, 0]]).float()
    for i, site in enumerate(sites):
        site.t["alpha"].copy_(scores[:, i : i + 1])
    D = recipe.form.delta(sites[0].t | sites[0].fixed | {"B": torch.ones(2, M, R)}, SITE)
    plain = torch.ones(M, R) @ sites[0].t["A"][0]
    torch.testing.assert_close(D[0], plain / (1 + math.exp(-3.0)))
    searched(recipe, sites)
    wanted = [[4, 0, 4, 0, 0, 0, 4, 4], [0, 0, 4, 4, 4, 4, 0, 0]]
    assert torch.stack(recipe.schedule.ranks(sites), -1).tolist() == wanted
    for i, site in enumerate(sites):
        for k in range(2):
            assert site.t["A"][k].any(-1).sum() == wanted[k][i]
    # Both trials left out the second module of layer 0: one rank of zeros stays.
    assert sites[1].t["A"].shape == (2, 1, N) and not sites[1].fixed["searching"].any()


# BiLoRA


@pytest.mark.parametrize("values", ["softmax", "real", "binary"])
def test_bilora_is_a_pseudo_svd(values):
    form, g = build("bilora", values=values).form, torch.Generator().manual_seed(0)
    t = {"P": torch.randn(M, R, generator=g), "Q": torch.randn(R, N, generator=g)}
    t["Lambda"] = torch.randn(R, generator=g)
    free = t["Lambda"].tolist()
    value = {
        "softmax": [math.exp(x) / sum(map(math.exp, free)) for x in free],
        "real": free,
        "binary": [1 / (1 + math.exp(-x)) for x in free],
    }[values]
    wanted = sum(value[j] * np.outer(t["P"][:, j], t["Q"][j]) for j in range(R))
    np.testing.assert_allclose(form.delta(t, SITE), wanted, rtol=1e-4, atol=1e-5)
    P, Q = t["P"].numpy(), t["Q"].numpy()
    penalty = 0.1 * sum(((X - np.eye(R)) ** 2).sum() for X in (P.T @ P, Q @ Q.T))
    if values == "binary":
        penalty += 0.1 * sum(-v * math.log(v) - (1 - v) * math.log(1 - v) for v in value)
    assert float(form.penalty(t, SITE)) == pytest.approx(penalty, rel=1e-5)
    start = form.init(SITE, evidence())
    assert not form.delta(start, SITE).any() and start["Q"].any()
    assert build("bilora").rule.held_out == {"Lambda"}


# CorDA, LoRA-DA, LoRA-GA-Pro


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_corda_splits_the_weight_seen_through_the_inputs(mode, scale):
    e = evidence(scale=scale)
    C = e.covariance.numpy() + 0.01 * np.trace(e.covariance.numpy()) / N * np.eye(N)
    U, S, Vh = np.linalg.svd(e.weight.numpy() @ C, full_matrices=False)
    part = range(R) if mode == "ipm" else range(M - R, M)
    wanted = sum(S[i] * np.outer(U[:, i], Vh[i] @ np.linalg.inv(C)) for i in part)
    t = build("corda", mode=mode).start.init(SITE, e)
    np.testing.assert_allclose(scale * t["B"] @ t["A"], wanted, rtol=1e-8, atol=1e-9)
    other = "kpm" if mode == "ipm" else "ipm"
    rest = build("corda", mode=other).start.init(SITE, e)
    np.testing.assert_allclose(
        scale * (t["B"] @ t["A"] + rest["B"] @ rest["A"]), e.weight, rtol=1e-8, atol=1e-9
    )
    assert build("corda").start.anchored


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_equals_peft(mode, monkeypatch):
    peft = pytest.importorskip("peft")
    # PEFT takes its dataclass from attrs, which it does not ask for.
    monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclass))
    from peft.tuners.lora.corda import preprocess_corda

    x, model, original = inputs(decay=0.9), One(), One().layer.weight.detach()
    config = peft.LoraConfig(
        r=R,
        lora_alpha=6.0,
        target_modules=["layer"],
        init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(
            corda_method=mode, prune_temporary_fields=False
        ),
    )
    preprocess_corda(model, config, lambda: model(x))
    C = model.layer.covariance_matrix
    theirs = peft.get_peft_model(model, config).base_model.model.layer
    e = Evidence(original, 6.0 / R, 0, "layer", None, C)
    t = build("corda", mode=mode).start.init(SITE, e)
    A, B = theirs.lora_A.default.weight, theirs.lora_B.default.weight
    torch.testing.assert_close(t["B"] @ t["A"], B @ A, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(t["A"].norm(dim=1), A.norm(dim=1), rtol=1e-5, atol=1e-5)
    # PEFT's C sums over tokens of inputs divided by their maximum; ours is a mean of the inputs.
    torch.testing.assert_close(C, x.T @ x / x.max() ** 2, rtol=1e-5, atol=1e-5)


def test_corda_survives_inputs_that_span_little():
    thin = torch.zeros(N, N)
    thin[0, 0] = 1.0
    for C in (thin, torch.zeros(N, N)):
        e = Evidence(evidence().weight.float(), 1.0, 0, "layer", None, C)
        t = build("corda").start.init(SITE, e)
        assert all(torch.isfinite(x).all() for x in t.values())


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("variance", [0.0, 0.03, 1e6])
def test_lora_da_takes_the_lowest_eigenvectors_of_the_guidance(diagonal, variance):
    e = evidence()
    start = build("lora_da", diagonal=diagonal, variance=variance, n_samples=50).start
    t = start.init(SITE, e)
    Z, Y, G = (x.numpy() for x in (e.covariance, e.gradient_covariance, e.gradient))
    Z, Y = Z + 1e-6 * np.eye(N), Y + 1e-6 * np.eye(M)
    y = [1 / Y[i, i] if diagonal else np.linalg.inv(Y)[i, i] for i in range(M)]
    D = np.stack([-y[i] * np.linalg.solve(Z, G[i]) for i in range(M)], 1)
    omega = np.zeros((N, N))
    for i in range(M):
        omega += variance * y[i] * np.linalg.inv(Z) / 50 - np.outer(D[:, i], D[:, i])
    values, vectors = np.linalg.eigh(omega)
    assert (np.diff(values[: R + 1]) > 0).all()
    A0 = vectors[:, :R]
    wanted = A0 @ A0.T @ D / np.linalg.norm(D, 2) / 1024  # [in, out] as in the paper
    np.testing.assert_allclose(t["B"] @ t["A"], wanted.T, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(t["A"] @ t["A"].T * 1024, np.eye(R), atol=1e-9)


def test_lora_da_without_variance_and_curvature_is_the_gradients_subspace():
    e = evidence()
    flat = Evidence(e.weight, 1.0, 0, "layer", e.gradient, torch.eye(N), torch.eye(M))
    t = build("lora_da", variance=0.0).start.init(SITE, flat)
    _, _, Vh = np.linalg.svd(e.gradient.numpy())
    np.testing.assert_allclose(t["A"].T @ t["A"] * 1024, Vh[:R].T @ Vh[:R], atol=1e-9)


def test_lora_ga_pro_takes_half_the_effective_rank():
    sites, found = many()
    got = ranks("lora_ga_pro", least=2, most=5)
    for s in sites:
        half = math.floor(effective_rank(found[s.name].gradient) / 2)
        assert got[s.name] == min(max(2, min(half, 5)), min(s.d_in, s.d_out) // 2)
    e, site = evidence(), Site("layer", N, M, 3)
    for name, x in build("lora_ga_pro").start.init(site, e).items():
        assert torch.equal(x, build("lora_ga").start.init(site, e)[name])


# All of them


DATA = ["gora", "ralora", "ralora_pro", "dralora", "eva", "corda", "lora_da", "lora_ga_pro"]


@pytest.mark.parametrize("name", DATA)
def test_data_is_asked_for_in_one_sentence(name):
    with pytest.raises(UserError, match="data"):
        adapt(One(), name, rank=2)


@pytest.mark.parametrize(
    "name,settings",
    [
        ("gora", {"gamma": -1}),
        ("gora", {"least": 2.0}),
        ("ralora", {"n_max": 3}),
        ("ralora_pro", {"smoothing": "log"}),
        ("eva", {"rho": 0.5}),
        ("eva", {"ratio": "none"}),
        ("prilora", {"first": 0.0}),
        ("prilora", {"every": 0}),
        ("prilora", {"share": 1.0}),
        ("autolora", {"search": 1.0}),
        ("autolora", {"search": 0.0}),
        ("diffora", {"search": 0.0}),
        ("diffora", {"share": 0.0}),
        ("bilora", {"values": "tanh"}),
        ("corda", {"mode": "both"}),
        ("corda", {"damping": 0.0}),
        ("lora_da", {"gamma": 0.0}),
        ("lora_da", {"variance": -1.0}),
        ("lora_ga_pro", {"least": 9, "most": 8}),
        ("lora_ga_pro", {"split": "AB"}),
    ],
)
def test_values_out_of_range_are_told(name, settings):
    with pytest.raises(UserError):
        build(name, **settings)


def test_the_update_starts_ahead_of_the_base_unless_it_is_anchored():
    x = inputs(8)
    batch = {"x": x}

    def loss(model, batch):
        return model(batch["x"]).square().mean()

    for name in ("gora", "lora_da"):
        base = One()(x)
        anchored = adapt(One(), name, rank=R, data=[batch], loss=loss, anchored=True)
        assert torch.equal(anchored.model(x), base)
        now = adapt(One(), name, rank=R, data=[batch], loss=loss).model(x)
        assert not torch.allclose(now, base) and now.square().mean() < base.square().mean()
    assert get("gora").recipe.form.scale(16.0, 4) == 8.0
