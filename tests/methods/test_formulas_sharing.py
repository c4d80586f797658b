"""Methods of the folder `sharing` against their papers in loops, against PEFT; who shares what."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from loralab import adapt, load
from loralab.errors import UserError
from loralab.methods import build
from loralab.methods.sharing.denselora import LinearDenseLoRA
from loralab.methods.sharing.lora_xs import SVDBases
from loralab.recipe import Evidence, Site

SHAPES = [(12, 8), (8, 12)]
R = 4


def rolled(chunk, copies, stride):
    """Concatenate copies [q, c], copy i read from row i * stride on."""
    return np.concatenate([np.roll(chunk, -i * stride, axis=0) for i in range(copies)], axis=1)


def stretch(logits, bank, k):
    """Return the mixture of the bank's vectors with the k largest logits, softmax over these."""
    best = sorted(range(len(logits)), key=lambda i: -logits[i])[:k]
    e = [math.exp(logits[i]) for i in best]
    return sum(w / sum(e) * bank[i] for w, i in zip(e, best, strict=True))


def middle(X, n, axis):
    start = (X.shape[axis] - n) // 2
    return np.take(X, range(start, start + n), axis)


def tied(f, t, m, n):
    D = np.zeros((m, n))
    for i in range(m):
        for j in range(n):
            for k in range(R):
                D[i, j] += t["v"][i] * t["B"][i, k] * t["u"][k] * t["A"][k, j]
    return D


def sharelora(f, t, m, n):
    return sum(np.outer(t["B"][:m, k], t["A"][k, :n]) for k in range(R))


def vb_lora(f, t, m, n):
    rows = [[stretch(s, t["bank"], f.k) for s in row] for row in t["logits_A"]]
    A = np.array([np.concatenate(row)[:n] for row in rows])
    columns = [[stretch(s, t["bank"], f.k) for s in col] for col in t["logits_B"].swapaxes(0, 1)]
    B = np.array([np.concatenate(column)[:m] for column in columns]).T
    return np.einsum("ik,kj->ij", B, A)


def rasa(f, t, m, n):
    own = t["A"].shape[0]
    D = sum(t["D"][k] * np.outer(t["B"][:, k], t["A"][k]) for k in range(own))
    for k in range(len(t["D"]) - own):
        D = D + t["D"][own + k] * np.outer(t["B_pool"][:m, k], t["A_pool"][k, :n])
    return D


def prolora(f, t, m, n):
    q = t["A0"].shape[0]
    A = rolled(t["A0"], f.m, max(q // f.m, 1))[:, :n]
    B = rolled(t["B0"].T, f.n, max(q // f.n, 1))[:, :m].T
    return B @ A + (t["B"] @ t["A"] if f.unshared else 0)


def prolora_hidden(f, t, m, n):
    def turned(chunk, copies):
        c = chunk.shape[1]
        return np.hstack([np.roll(chunk, i * max(c // copies, 1), 1) for i in range(copies)])

    return turned(t["B0"].T, f.n)[:, :m].T @ turned(t["A0"], f.m)[:, :n] + t["B"] @ t["A"]


def bslora(f, t, m, n):
    D = t["B"] @ t["A"]
    for level in ("intra", "inter"):
        own = {k.split(f"_{level}")[0]: v for k, v in t.items() if k.endswith(level)}
        A, B = own["A"], own["B"]
        if f.transform == "slice":
            D = D + middle(B, m, 0) @ middle(A, n, 1)
        elif f.transform == "gate":
            D = D + own["g_ou"] @ own["g_od"] @ B @ A @ own["g_iu"] @ own["g_id"]
        else:
            D = D + np.kron(own["K_B"], B)[:m] @ np.kron(own["K_A"], A)[:, :n]
    return D


def lora_xs(f, t, m, n):
    return t["U_r"] @ t["R"] @ t["V_r"]


def tinylora(f, t, m, n):
    return t["U_r"] @ sum(v * P for v, P in zip(t["v"], t["P"], strict=True)) @ t["V_r"]


def denselora(f, t, m, n):
    return np.einsum("ik,kl,lj->ij", t["B"][:m], t["M"], t["A"][:, :n])


CASES = {
    "tied_lora": (build("tied_lora").form, tied),
    "sharelora A": (build("sharelora").form, sharelora),
    "sharelora AB": (build("sharelora", share="AB", across="model").form, sharelora),
    "vb_lora": (build("vb_lora", n_vectors=7, length=4).form, vb_lora),
    "vb_lora cut": (build("vb_lora", n_vectors=7, length=5, k=3).form, vb_lora),
    "rasa": (build("rasa").form, rasa),
    "rasa k": (build("rasa", k=2, weights="ones").form, rasa),
    "prolora": (build("prolora").form, prolora),
    "prolora odd": (build("prolora", unshared=0, m=3, n=5).form, prolora),
    "prolora hidden": (build("prolora", rotate="hidden").form, prolora_hidden),
    "bslora slice": (build("bslora", transform="slice").form, bslora),
    "bslora gate": (build("bslora", transform="gate", size=6).form, bslora),
    "bslora kron": (build("bslora", transform="kron", size=5).form, bslora),
    "bslora large": (build("bslora", transform="kron", size=32).form, bslora),
    "lora_xs": (build("lora_xs").form, lora_xs),
    "tinylora": (build("tinylora", u=5).form, tinylora),
    "denselora": (LinearDenseLoRA(), denselora),
}


def generic(form, site, lead=(), seed=0):
    """Random tensors of the Form's shapes; shared ones as large as their group's largest site."""
    large = Site("shared", 14, 14, site.rank, n_layers=site.n_layers)
    sizes = {}
    for at in (site, large):
        evidence = Evidence(torch.ones(at.d_out, at.d_in, dtype=torch.float64), 1.0, 0, at.name)
        made = form.init(at, evidence)
        sizes |= {n: v.shape for n, v in made.items() if at is site or n in form.shared}
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(*lead, *s, generator=g, dtype=torch.float64) for n, s in sizes.items()}


@pytest.mark.parametrize("lead", [(), (2,)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_form_equals_the_paper(case, shape, lead):
    form, oracle = CASES[case]
    site = Site("a.0.q", shape[1], shape[0], R, n_layers=3)
    t = generic(form, site, lead)
    D = form.delta(t, site)
    assert D.shape == (*lead, *shape)
    for index in np.ndindex(lead):
        own = {n: v[index].numpy() for n, v in t.items()}
        np.testing.assert_allclose(D[index].numpy(), oracle(form, own, *shape), atol=1e-11)


@pytest.mark.parametrize("lead", [(), (2,)], ids=str)
def test_denselora_has_gelu_after_encoder_and_decoder(lead):
    form, site = build("denselora").form, Site("a", 8, 12, R)
    t = generic(form, site, lead)
    x = torch.randn(*lead, 3, 8, dtype=torch.float64)

    def gelu(z):
        return np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in z])

    y = form.branch(t, x, site)
    for index in np.ndindex(lead):
        A, M, B = (t[n][index].numpy() for n in ("A", "M", "B"))
        for row, found in zip(x[index].numpy(), y[index].numpy(), strict=True):
            wanted = gelu(B[:12] @ M @ gelu(A[:, :8] @ row))
            np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_prolora_treats_no_two_stretches_of_the_input_alike():
    """Without the rotation, copies of A0 and B0 would repeat the same block of dW."""
    form, site = build("prolora", unshared=0).form, Site("a", 8, 12, R)
    D = form.delta(generic(form, site), site)
    assert not torch.allclose(D[:, :4], D[:, 4:]) and not torch.allclose(D[:6], D[6:])


def start_of(name, W, rank=R, **settings):
    recipe = build(name, **settings)
    site = Site("a", W.shape[1], W.shape[0], rank, n_layers=6)
    evidence = Evidence(W, recipe.form.scale(float(rank), rank), 0, "a")
    return recipe.form.init(site, evidence) | recipe.start.init(site, evidence)


def test_prolora_start_is_bounded_by_all_inputs():
    t = start_of("prolora", torch.zeros(40, 400, dtype=torch.float64))
    assert t["A0"].shape == (R - 1, 200)
    assert 0.95 * 400**-0.5 < t["A0"].abs().max() <= 400**-0.5


def test_rasa_pool_and_weights():
    """r - k + L k ranks; s D is alpha / 2 over either count; k = r / 8."""
    t = start_of("rasa", torch.zeros(10, 9, dtype=torch.float64), rank=8)
    assert t["A"].shape == (7, 9) and t["A_pool"].shape == (6, 9) and t["D"].shape == (13,)
    np.testing.assert_allclose(t["D"], [4 / 7] * 7 + [4 / 6] * 6)
    t = start_of("rasa", torch.zeros(40, 40, dtype=torch.float64), rank=32, weights="ones")
    assert t["A_pool"].shape == (24, 40) and (t["D"] == 1).all()


@pytest.mark.parametrize("side", ["in", "out", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_svd_bases_are_the_best_rank_r_part(shape, side):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = start_of("lora_xs", W, sigma_side=side)
    U, S, Vt = np.linalg.svd(W.numpy(), full_matrices=False)
    np.testing.assert_allclose(t["U_r"] @ t["V_r"], (U[:, :R] * S[:R]) @ Vt[:R], atol=1e-12)
    norms = t["U_r"].norm(dim=0).numpy()
    np.testing.assert_allclose(norms, S[:R] ** {"in": 0, "out": 1, "both": 0.5}[side])


def test_svd_bases_options_and_the_papers_sides():
    W = torch.randn(30, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    U, S, Vt = np.linalg.svd(W.numpy(), full_matrices=False)
    bottom = start_of("lora_xs", W, part="bottom")
    np.testing.assert_allclose(
        bottom["U_r"] @ bottom["V_r"], (U[:, -R:] * S[-R:]) @ Vt[-R:], atol=1e-12
    )
    fast, exact = start_of("lora_xs", W, niter=30), start_of("lora_xs", W)
    torch.testing.assert_close(fast["U_r"] @ fast["V_r"], exact["U_r"] @ exact["V_r"])
    assert build("lora_xs").start.sigma_side == "in"  # x W = x U S V^T: S with the input's side
    assert build("tinylora").start.sigma_side == "out"  # U S (...) V^T
    assert not SVDBases().seeded and SVDBases(niter=2).seeded
    with pytest.raises(UserError, match="top triplets only"):
        SVDBases(part="bottom", niter=2)


@pytest.mark.parametrize("shape", [(120, 200), (200, 120)], ids=str)
def test_randlora_starts_from_bases_of_unit_variance(shape):
    """Each of A and B by itself; LoRAFactory divides B by A's deviation, which is 1 by then."""
    site = Site("s", shape[1], shape[0], 40)
    t = build("randlora").form.init(site, Evidence(torch.zeros(shape), 1.0, 0, "s"))
    assert t["A"].shape == (40, 120) and t["B"].shape == (200, 3 * 40)
    for bases in (t["A"], t["B"]):  # U(±√3)
        assert bases.std().item() == pytest.approx(1, abs=0.02)
        assert bases.mean().item() == pytest.approx(0, abs=0.05)
        assert 0.99 * 3**0.5 < bases.abs().max() <= 3**0.5
    assert torch.equal(t["Lambda"], torch.zeros(3, 40))
    assert torch.equal(t["Gamma"], torch.full((3, 120), 1 / 120))


def test_lora_xs_starts_from_a_trace():
    W = torch.randn(30, 20, dtype=torch.float64)
    assert not start_of("lora_xs", W, sigma=0.0)["R"].any()
    R0 = start_of("lora_xs", W, rank=16)["R"]
    assert 0.8e-5 < R0.std() < 1.2e-5


def test_tied_lora_can_freeze_any_part_and_starts_at_the_base():
    for train in ("ABuv", "B", "uv", "ABv", "v"):
        form, site = build("tied_lora", train=train).form, Site("a", 8, 12, R)
        t = form.init(site, Evidence(torch.ones(12, 8), 1.0, 0, "a"))
        assert set(t) - form.frozen == set(train)
        assert not form.delta(t, site).any() and (t["A"].any() and (t["B"].any() or t["v"].any()))
    with pytest.raises(UserError, match="B or v among them"):
        build("tied_lora", train="Au")


class Blocks(nn.Module):
    """Some blocks of a query and a wider value projection, with a residual."""

    def __init__(self, n_blocks=4, n=8, m=12):
        super().__init__()
        g = torch.Generator().manual_seed(5)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(n, n), "v": nn.Linear(n, m)}) for _ in range(n_blocks)
        )
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.randn(p.shape, generator=g) * (0.2 + 0.02 * i))

    def forward(self, x):
        for layer in self.layers:
            h = layer["v"](torch.tanh(layer["q"](x)))
            x = x + torch.tanh(h[..., :8]) + h[..., -8:]
        return x


def batch():
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(9))


def adapted(method, **more):
    data, loss = [batch()], lambda model, x: (model(x) - 1).square().mean()
    return adapt(Blocks(), method, data=data, loss=loss, **{"rank": R, **more})


def stray(adapter):
    """Move every trained tensor off its start and return the adapter."""
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.3)
    return adapter


def holders(adapter, tensor):
    """Return the sets of sites that hold one and the same tensor of that name."""
    groups = {}
    for name, (_, bank) in zip(adapter.pack.names, adapter.pack.banks(), strict=True):
        groups.setdefault(id(getattr(bank, tensor)), []).append(name)
    return sorted(groups.values())


ALL = [f"layers.{i}.{kind}" for i in range(4) for kind in "qv"]
BY_KIND = [ALL[::2], ALL[1::2]]
BY_LAYER = [ALL[i : i + 2] for i in range(0, 8, 2)]

SHARING = {
    "tied_lora": ("tied_lora", {}, {"A": BY_KIND, "B": BY_KIND, "v": [[n] for n in ALL]}),
    "sharelora": ("sharelora", {}, {"A": BY_KIND, "B": [[n] for n in ALL]}),
    "sharelora B": ("sharelora", {"share": "B"}, {"A": [[n] for n in ALL], "B": BY_KIND}),
    "sharelora model": ("sharelora", {"across": "model"}, {"A": [ALL]}),
    "vb_lora": ("vb_lora", {"n_vectors": 9, "length": 4}, {"bank": [ALL]}),
    "rasa": ("rasa", {}, {"A_pool": BY_KIND, "B_pool": BY_KIND, "D": [[n] for n in ALL]}),
    "denselora": ("denselora", {}, {"A": BY_KIND, "B": BY_KIND, "M": [[n] for n in ALL]}),
    "bslora": ("bslora", {}, {"A_intra": BY_LAYER, "A_inter": [ALL], "A": [[n] for n in ALL]}),
    "tinylora": ("tinylora", {}, {"v": [[n] for n in ALL]}),
    "tinylora layer": ("tinylora", {"tie": "layer"}, {"v": BY_LAYER}),
    "tinylora kind": ("tinylora", {"tie": "kind"}, {"v": BY_KIND}),
}


@pytest.mark.parametrize("case", SHARING)
def test_who_shares_what(case):
    method, settings, wanted = SHARING[case]
    adapter = adapted(method, **settings)
    for tensor, groups in wanted.items():
        assert holders(adapter, tensor) == sorted(groups), tensor


def test_thirteen_parameters():
    adapter = adapted("tinylora", u=13, tie="model", rank=2)
    assert sum(p.numel() for p in adapter.parameters()) == 13


def test_rasa_has_more_ranks_than_lora_at_its_count():
    """r - k + L k ranks per layer; beside LoRA's count only D is added."""
    adapter, lora = stray(adapted("rasa")), adapted("lora")
    _, bank = next(adapter.pack.banks())
    assert torch.linalg.matrix_rank(bank.delta()[0]) == R - 1 + 4
    weights = 8 * (R - 1 + 4)
    count = sum(p.numel() for p in adapter.parameters())
    assert count == sum(p.numel() for p in lora.parameters()) + weights


def test_vb_lora_starts_off_the_base_unless_anchored():
    bare, small = Blocks()(batch()), {"n_vectors": 9, "length": 4}
    assert not torch.equal(adapted("vb_lora", **small).model(batch()), bare)
    assert torch.equal(adapted("vb_lora", **small, anchored=True).model(batch()), bare)


def test_bslora_ignores_alpha_and_has_the_authors_ranks():
    adapter = adapted("bslora", rank=8, alpha=99.0)
    _, bank = next(adapter.pack.banks())
    assert bank.scale.item() == 2.0
    assert [bank.A.shape[1], bank.A_intra.shape[1], bank.A_inter.shape[1]] == [2, 4, 8]


def entropy(*parts, unit=1.0):
    return math.log(np.concatenate([p.ravel() for p in parts]).std() / unit) + 0.5 * math.log(
        2 * math.pi * math.e
    )


def test_e2lora_follows_entropy_and_mutual_information():
    """The note's formulas on concatenated gradients, greedily, kind by kind."""
    rng = np.random.default_rng(3)
    G = [rng.normal(size=(6, 5)) * s for s in (2.0, 2.2, 9.0, 8.0, 8.5, 3.0)]
    H = [entropy(g) for g in G]

    def rmi(i, j):
        return (H[i] + H[j] - entropy(G[i], G[j])) / min(H[i], H[j])

    parts, i = [], 0
    while i < len(G):
        j, tau = i + 1, np.mean([rmi(i, k) for k in range(len(G)) if k != i])
        while j < len(G) and rmi(i, j) >= tau:
            j += 1
        parts.append(list(range(i, j)))
        i = j
    assert 1 < len(parts) < len(G)
    sites = [Site(f"layers.{k}.q", 5, 6, 4, "q", k, len(G)) for k in range(len(G))]

    def evidence(site):
        return Evidence(torch.zeros(6, 5), 1.0, 0, site.name, torch.tensor(G[site.layer]))

    tops = [max(H[k] for k in part) for part in parts]
    for budget, shares in (("layers", [len(p) for p in parts]), ("intervals", [1] * len(parts))):
        start = build("e2lora", unit=1.0, budget=budget).start
        whole = sum(h * n for h, n in zip(tops, shares, strict=True))
        ranks, groups = start.ranks(sites, evidence), start.groups(sites, evidence)
        for part, h in zip(parts, tops, strict=True):
            for k in part:
                assert ranks[sites[k].name] == min(round(24 * h / whole), 5)
                assert groups[sites[k].name] == sites[part[0]].name


def test_e2lora_of_dead_gradients_and_without_data():
    start = build("e2lora").start
    assert start.entropy((10.0, 0.0, 0.0)) == pytest.approx(0.5 * math.log(2 * math.pi * math.e))
    site = Site("layers.0.q", 5, 6, 4, "q")
    assert start.ranks(
        [site], lambda s: Evidence(torch.zeros(6, 5), 1.0, 0, s.name, torch.zeros(6, 5))
    )
    with pytest.raises(UserError, match="give `data`"):
        start.ranks([site], lambda s: Evidence(torch.zeros(6, 5), 1.0, 0, s.name))


def test_e2lora_shares_within_its_intervals_and_comes_back_from_disk(tmp_path):
    adapter = stray(adapted("e2lora"))
    groups = adapter.pack.slots[0].site_groups
    wanted = {}
    for name, group in groups.items():
        wanted.setdefault(group, []).append(name)
    assert 2 < len(wanted) < 8  # fewer pairs than layers, more than kinds
    assert holders(adapter, "A") == holders(adapter, "B") == sorted(wanted.values())
    y = adapter.model(batch())
    adapter.save(tmp_path / "e2")
    fresh = Blocks()
    again = load(fresh, tmp_path / "e2")
    torch.testing.assert_close(fresh(batch()), y)
    assert holders(again, "A") == sorted(wanted.values())


@pytest.mark.parametrize("method", ["rasa", "bslora", "vb_lora", "tied_lora", "sharelora"])
def test_shared_tensors_come_back_from_disk(method, tmp_path):
    adapter = stray(adapted(method))
    y = adapter.model(batch())
    adapter.save(tmp_path / method)
    fresh = Blocks()
    load(fresh, tmp_path / method)
    torch.testing.assert_close(fresh(batch()), y)


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("sharelora", {"share": "C"}, "share of ShareLoRA .* 'A', 'B' or 'AB'"),
        ("sharelora", {"across": "x"}, "across of ShareLoRA .* 'kind', 'model' or 'start'"),
        ("vb_lora", {"k": 300}, "k of VBLoRA is between 1 and n_vectors, not 300"),
        ("vb_lora", {"k": 0}, "k of VBLoRA must be a whole number from 1 on, not 0"),
        ("vb_lora", {"length": 0}, "length of VBLoRA must be a whole number from 1 on"),
        ("vb_lora", {"bound": 0.0}, "bound of VBLoRA must be positive"),
        ("vb_lora", {"ratio": 0.0}, "ratio of BankRates must be positive, not 0.0"),
        ("rasa", {"k": 0}, "k of RaSA must be a whole number from 1 on, not 0"),
        ("rasa", {"weights": "x"}, "weights of RaSA .* 'balanced' or 'ones'"),
        ("prolora", {"m": 0}, "m of PRoLoRA must be a whole number from 1 on, not 0"),
        ("prolora", {"unshared": -1}, "unshared of PRoLoRA must be a whole number from 0 on"),
        ("prolora", {"rotate": "x"}, "rotate of PRoLoRA .* 'rank' or 'hidden'"),
        ("bslora", {"transform": "x"}, "transform of BSLoRA .* 'slice', 'gate' or 'kron'"),
        ("bslora", {"local": 0.0}, "local of BSLoRA must be positive, not 0.0"),
        ("lora_xs", {"sigma": -1.0}, "sigma of LoRAXS must be at least 0, not -1.0"),
        ("lora_xs", {"sigma_side": "x"}, "sigma_side of SVDBases .* 'in', 'out' or 'both'"),
        ("tinylora", {"u": 0}, "u of TinyLoRA must be a whole number from 1 on, not 0"),
        ("tinylora", {"tie": "x"}, "tie of TinyLoRA .* 'none', 'layer', 'kind' or 'model'"),
        ("e2lora", {"unit": 0.0}, "unit of EntropyIntervals must be positive, not 0.0"),
        ("e2lora", {"budget": "x"}, "budget of EntropyIntervals .* 'layers' or 'intervals'"),
    ],
)
def test_settings_are_checked(method, settings, words):
    with pytest.raises(UserError, match=words):
        build(method, **settings)


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [("rasa", {"k": 4}, "r exceeds k = 4"), ("prolora", {"unshared": 4}, "rank exceeds that")],
)
def test_ranks_that_leave_nothing_to_share(method, settings, words):
    with pytest.raises(UserError, match=words):
        adapted(method, **settings)


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


def vb_parts(model):
    layer = model.base_model.model.layer
    return {
        "bank": model.base_model.vblora_vector_bank["default"],
        "logits_A": layer.vblora_logits_A["default"],
        "logits_B": layer.vblora_logits_B["default"],
    }


def tiny_parts(model):
    layer = model.base_model.model.layer
    return {
        "v": model.base_model.tinylora_v["default"]["0"],
        "P": layer.tinylora_P["default"],
        "U_r": layer.tinylora_B["default"],
        "V_r": layer.tinylora_A["default"],
    }


def peft_case(name):
    peft = pytest.importorskip("peft")
    if name == "vb_lora":
        config = peft.VBLoRAConfig(r=R, num_vectors=9, vector_length=4, topk=2)
        return config, {"n_vectors": 9, "length": 4}, vb_parts
    return peft.TinyLoraConfig(r=R, u=5), {"u": 5}, tiny_parts


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["vb_lora", "tinylora"])
def test_same_tensors_same_output_gradient_and_merge_as_peft(name, shape):
    peft = pytest.importorskip("peft")
    config, settings, read = peft_case(name)
    config.target_modules = ["layer"]
    theirs = peft.get_peft_model(One(*shape), config)
    g = torch.Generator().manual_seed(3)
    leaves = [p for p in theirs.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in leaves:
            p.add_(torch.randn(p.shape, generator=g) * 0.3)
    ours = adapt(One(*shape), name, rank=R, **settings)
    (_, bank) = next(ours.pack.banks())
    assert set(bank.names) == set(read(theirs))
    with torch.no_grad():
        for tensor, value in read(theirs).items():
            getattr(bank, tensor).copy_(value)
    x = torch.randn(3, 5, shape[0], generator=g)
    weights = torch.linspace(-1, 1, 15 * shape[1]).view(3, 5, -1)
    y, y2 = ours.model(x), theirs(x)
    torch.testing.assert_close(y, y2, rtol=1e-5, atol=1e-5)
    own = torch.autograd.grad((y * weights).sum(), [getattr(bank, n) for n in bank.trained])
    named = {n: p for n, p in read(theirs).items() if n in bank.trained}
    other = torch.autograd.grad((y2 * weights).sum(), list(named.values()))
    for tensor, grad in zip(named, other, strict=True):
        found = own[bank.trained.index(tensor)][0]
        torch.testing.assert_close(found, grad, rtol=1e-5, atol=1e-5, msg=tensor)
    merged = theirs.merge_and_unload().layer.weight
    torch.testing.assert_close(ours.merge().layer.weight, merged, rtol=1e-5, atol=1e-5)


def test_pinned_difference_tinylora_splits_the_singular_values_in_peft():
    """Were PEFT to write U S beside V as the paper does, sigma_side="both" could go."""
    peft = pytest.importorskip("peft")
    config = peft.TinyLoraConfig(r=R, u=5, target_modules=["layer"])
    theirs = tiny_parts(peft.get_peft_model(One(8, 12), config))
    W = One(8, 12).layer.weight.detach()
    paper, split = start_of("tinylora", W), start_of("tinylora", W, sigma_side="both")
    for side in ("U_r", "V_r"):
        torch.testing.assert_close(split[side].abs(), theirs[side].abs())
        assert not torch.allclose(paper[side].abs(), theirs[side].abs())
