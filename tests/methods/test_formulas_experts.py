"""Mixtures of experts against the papers' formulas, token by token and expert by expert."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from loralab import adapt
from loralab.errors import UserError
from loralab.methods import build
from loralab.methods.experts import _routing as routing
from loralab.recipe import Evidence, Site

SITE = Site("layers.1.mlp.up", 8, 12, 2, "up", layer=1, n_layers=2)
ROUTED = ["lora_moe", "moelora", "mola", "adamole", "goat", "sira", "mixlora", "moa"]
BY_SEQUENCE = {"lora_moe", "moa"}


def draw(seed, *shape):
    return torch.tensor(np.random.default_rng(seed).normal(size=shape))


def at_random(form, site=SITE, lead=()):
    """Return tensors of the shapes that the form makes, at a generic point."""
    W = draw(0, site.d_out, site.d_in)
    made = form.init(site, Evidence(W, 1.0, 0, site.name))
    return {n: draw(i + 1, *lead, *v.shape) for i, (n, v) in enumerate(made.items())}


def softmax(v):
    e = np.exp(v - v.max())
    return e / e.sum()


def probabilities(t, x):
    return softmax(t["W_g"].numpy() @ x)


def best(p, k):
    """Return the numbers of the k largest entries; of equal ones the first."""
    return sorted(range(len(p)), key=lambda i: (-p[i], i))[:k]


def expert(t, i, n_experts, A="A", B="B"):
    """Return B_i A_i as a dense matrix."""
    r = t[A].shape[0] // n_experts
    rows = slice(i * r, (i + 1) * r)
    return t[B].numpy()[:, rows] @ t[A].numpy()[rows]


def normalised_top(t, x, k):
    """Return {expert: weight} for one token."""
    p = probabilities(t, x)
    on = best(p, k)
    return {i: p[i] / sum(p[j] for j in on) for i in on}


def mixed(t, x, omega, n_experts, A="A", B="B"):
    return sum(w * expert(t, i, n_experts, A, B) @ x for i, w in omega.items())


def lora_moe(form, t, x):
    return mixed(t, x, dict(enumerate(probabilities(t, x))), form.n_experts)


def moelora(form, t, x):
    return mixed(t, x, normalised_top(t, x, form.top_k), form.n_experts)


def mola(form, t, x):
    return mixed(t, x, normalised_top(t, x, 2), len(t["W_g"]))


def adamole(form, t, x):
    g = probabilities(t, x)
    tau = 1 / len(g) / (1 + math.exp(-(t["W_tau"].numpy()[0] @ x + t["b_tau"].item())))
    over = {i: g[i] - tau for i in range(len(g)) if g[i] > tau}
    return mixed(t, x, {i: w / sum(over.values()) for i, w in over.items()}, len(g))


def goat(form, t, x):
    first = {"W_g": t["W_g0"]}
    now = mixed(t, x, normalised_top(t, x, 2), 8)
    then = mixed(t, x, normalised_top(first, x, 2), 8, "A0", "B0")
    return math.sqrt(3 * 8 / 1) * (now - then)  # n = 8 inputs, one rank per expert


def sira(form, t, x):
    p = probabilities(t, x)
    return mixed(t, x, {i: p[i] for i in best(p, 4)}, 16)


EXACT = {"goat": {"residual": "exact"}}  # the paper's mean has a test of its own
LOOPS = {f.__name__: f for f in (lora_moe, moelora, mola, adamole, goat, sira)} | {
    "mixlora": moelora
}


@pytest.mark.parametrize("lead", [(), (3,)], ids=str)
@pytest.mark.parametrize("name", LOOPS)
def test_forms_equal_the_loops(name, lead):
    """Every token by itself; under a pack axis each slot has its own router and experts."""
    form = build(name, **EXACT.get(name, {})).form
    t, x = at_random(form, lead=lead), draw(9, *lead, 5, SITE.d_in)
    x_seen = x.unsqueeze(-3) if name in BY_SEQUENCE else x
    y = form.branch(t, x_seen, SITE).reshape(*lead, 5, SITE.d_out)
    for index in np.ndindex(lead):
        own = {n: v[index] for n, v in t.items()}
        wanted = [LOOPS[name](form, own, row) for row in x[index].numpy()]
        np.testing.assert_allclose(y[index].numpy(), np.array(wanted), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ROUTED)
def test_a_fresh_update_is_nothing(name):
    form = build(name, **EXACT.get(name, {})).form
    t = form.init(SITE, Evidence(draw(0, 12, 8).float(), 1.0, 0, SITE.name))
    x = draw(1, 4, 3, 8).float()
    y = form.branch(t, x if name in BY_SEQUENCE else x.flatten(0, 1), SITE)
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("name", ROUTED)
def test_losses_do_not_see_padding(name):
    """The loss with padding marked is the loss without these tokens, for every slot."""
    # The contrastive loss has its own test: its keys are the tokens that come next.
    form = build(name, **({"contrast": 0.0} if name == "moelora" else {})).form
    t, x = at_random(form, lead=(2,)), draw(3, 2, 3, 4, SITE.d_in)
    short, valid = x[:, :, :3], torch.ones(2, 3, 4, dtype=torch.float64)
    valid[..., 3] = 0
    if name in BY_SEQUENCE:
        more = {"domain": torch.tensor([[0, 1, 1], [1, 0, 0]])}
    else:
        more, x, short, valid = {}, x.flatten(1, 2), short.flatten(1, 2), valid.flatten(1, 2)
    padded = form.aux_loss(t | more | {"valid": valid}, x, SITE)
    torch.testing.assert_close(padded, form.aux_loss(t | more, short, SITE))
    assert padded.shape == (2,) and not torch.equal(padded[0], padded[1])


@pytest.mark.parametrize(("name", "k"), [("moelora", 2), ("mola", 2), ("goat", 2), ("mixlora", 2)])
def test_balance_is_the_switch_transformers(name, k):
    """N Σ f_i P_i by counting; even routing gives k, and routing all to one pair more.

    MoLA's f_i is the share of all picks: the sum of the f_i is 1 there, and k for the others.
    MixLoRA's loss is the mean over blocks, by its authors' code.
    """
    more = {"moelora": {"contrast": 0.0}, "mixlora": {"load": "all"}}.get(name, {})
    form = build(name, balance=0.5, **more).form
    t, x = at_random(form), draw(4, 20, SITE.d_in)
    n = len(t["W_g"])
    counts, P = np.zeros(n), np.zeros(n)
    for row in x.numpy():
        p = probabilities(t, row)
        P += p / len(x)
        for i in best(p, k):
            counts[i] += 1 / len(x) / (k if name == "mola" else 1)
    wanted = 0.5 * n * sum(counts * P) / (SITE.n_layers if name == "mixlora" else 1)
    assert form.aux_loss(t, x, SITE).item() == pytest.approx(wanted, rel=1e-9)
    even = torch.full((4, 4), 0.25, dtype=torch.float64)
    assert routing.balance(even, routing.chosen(even, 2), {}).item() == pytest.approx(2.0)


def test_mixlora_balances_first_experts_against_what_the_router_gives_out():
    form = build("mixlora", balance=0.5).form
    t, x = at_random(form), draw(4, 20, SITE.d_in)
    n = len(t["W_g"])
    F, P = np.zeros(n), np.zeros(n)
    for row in x.numpy():
        p = probabilities(t, row)
        F[np.argmax(p)] += 1 / len(x)
        for i in best(p, 2):
            P[i] += p[i] / len(x)
    wanted = 0.5 * n * sum(F * P) / SITE.n_layers
    assert form.aux_loss(t, x, SITE).item() == pytest.approx(wanted, rel=1e-9)


def test_a_base_in_bf16_routes_as_in_fp32():
    """The same experts for every token with weights that agree far below bf16's own rounding."""
    x, t = draw(1, 2, 2000, SITE.d_in).bfloat16(), {"W_g": draw(2, 2, 8, SITE.d_in).bfloat16()}
    exact = routing.router({"W_g": t["W_g"].float()}, x.float())
    p = routing.router(t, x)
    assert torch.equal(routing.chosen(p, 2).float(), routing.chosen(exact, 2))
    torch.testing.assert_close(p.float(), exact, rtol=1e-6, atol=1e-7)
    rounded = routing.chosen((x @ t["W_g"].mT).softmax(-1), 2).float()
    assert not torch.equal(rounded, routing.chosen(exact, 2)), "these tokens show nothing"


@pytest.mark.parametrize("name", [*ROUTED, "hydralora"])
def test_outputs_and_gradients_keep_the_dtype_of_the_base(name):
    form = build(name).form
    t = {n: v.bfloat16() for n, v in at_random(form, lead=(2,)).items()}
    x = draw(9, 2, 3, 5, SITE.d_in).bfloat16()
    x = (x if name in BY_SEQUENCE else x.flatten(1, 2)).requires_grad_()
    trained = [v.requires_grad_() for v in t.values()]
    y = form.branch(t, x, SITE)
    assert y.dtype == torch.bfloat16
    exact = form.branch({n: v.float() for n, v in t.items()}, x.float(), SITE)
    assert (y - exact).norm() < 0.02 * exact.norm()
    loss = y.float().square().sum()
    if name != "hydralora":
        loss = loss + form.aux_loss(t, x, SITE).float().sum()
    grads = torch.autograd.grad(loss, [x, *trained], allow_unused=True)
    assert all(g is None or (g.dtype == torch.bfloat16 and g.isfinite().all()) for g in grads)
    assert grads[0].any()


def test_equal_probabilities_choose_the_first_experts_alone_and_in_a_pack():
    p = torch.tensor([0.2, 0.3, 0.3, 0.2]).expand(3, 5, 4)
    assert torch.equal(routing.chosen(p, 1), torch.tensor([0.0, 1, 0, 0]).expand(3, 5, 4))
    assert torch.equal(routing.chosen(p, 3), torch.tensor([1.0, 1, 1, 0]).expand(3, 5, 4))
    assert torch.equal(routing.chosen(p[0, :1], 3), routing.chosen(p, 3)[0, :1])
    assert torch.equal(routing.top_k(p, 2)[0, 0], torch.tensor([0, 0.5, 0.5, 0]))


@pytest.mark.parametrize("labels", [None, [0, 1, 1], [1, -1, 0]], ids=str)
@pytest.mark.parametrize("squared_mean", [False, True])
def test_lora_moe_constraint(labels, squared_mean):
    form = build("lora_moe", balance=0.3, imbalance=0.2, squared_mean=squared_mean).form
    t, x = at_random(form), draw(5, 3, 4, SITE.d_in)
    Z = []
    for m in range(3):
        for n in range(6):
            Q = sum(probabilities(t, x[m, j].numpy())[n] for j in range(4))
            same = labels is None or (n >= 3) == labels[m]
            Z.append(Q * (1 if labels is None or labels[m] < 0 else 1.2 if same else 0.8))
    Z = np.array(Z)
    wanted = 0.3 * Z.var() / Z.mean() ** (2 if squared_mean else 1)
    given = {} if labels is None else {"domain": torch.tensor(labels)}
    assert form.aux_loss(t | given, x, SITE).item() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("squared_mean", [False, True])
def test_lora_moe_constraint_is_0_on_padding_alone_and_not_of_rounding(squared_mean):
    form = build("lora_moe", squared_mean=squared_mean).form
    t, x = at_random(form), draw(5, 2, 400, SITE.d_in).bfloat16()
    half = {n: (0.05 * v).bfloat16() for n, v in t.items()}  # nearly balanced
    t = {n: v.float() for n, v in half.items()}
    assert form.aux_loss(t | {"valid": torch.zeros(2, 400)}, x.float(), SITE).item() == 0
    exact = form.aux_loss(t, x.float(), SITE).item()
    assert form.aux_loss(half, x, SITE).item() == pytest.approx(exact, rel=0.03)


def test_lora_moe_top_k_is_an_option():
    form = build("lora_moe", top_k=2).form
    t, x = at_random(form), draw(9, 1, 1, SITE.d_in)
    wanted = mixed(t, x[0, 0].numpy(), normalised_top(t, x[0, 0].numpy(), 2), 6)
    np.testing.assert_allclose(form.branch(t, x, SITE)[0, 0].numpy(), wanted, rtol=1e-9)


@pytest.mark.parametrize("valid", [None, [1, 1, 0, 1, 1]], ids=str)
def test_moelora_contrast_compares_outputs(valid):
    """InfoNCE on the dense outputs: the key of the same expert on the next token is positive."""
    form = build("moelora", n_experts=3, top_k=2, balance=0.0, contrast=0.7).form
    t, x = at_random(form), draw(6, 5, SITE.d_in)
    outputs = [[expert(t, i, 3) @ row for i in range(3)] for row in x.numpy()]
    losses = []
    for n in range(5):
        if valid is not None and not (valid[n] and valid[(n + 1) % 5]):
            continue
        for i in best(probabilities(t, x[n].numpy()), 2):
            keys = outputs[(n + 1) % 5]
            alike = np.array([outputs[n][i] @ key for key in keys]) / 0.07
            losses.append(alike.max() + math.log(np.exp(alike - alike.max()).sum()) - alike[i])
    given = {} if valid is None else {"valid": torch.tensor(valid, dtype=torch.float64)}
    loss = form.aux_loss(t | given, x, SITE).item()
    assert loss == pytest.approx(0.7 * np.mean(losses), rel=1e-9)


def test_mola_has_more_experts_above():
    form = build("mola").form

    def numbers(form, n_layers):
        return [
            form.n_experts(Site("s", 8, 8, 2, layer=i, n_layers=n_layers)) for i in range(n_layers)
        ]

    assert numbers(form, 8) == [2, 2, 4, 4, 6, 6, 8, 8]
    assert numbers(form, 1) == [2] and numbers(form, 2) == [2, 6]
    assert numbers(build("mola", experts="8, 2").form, 3) == [8, 8, 2]
    top = Site("s", 8, 12, 2, layer=3, n_layers=4)
    made = form.init(top, Evidence(draw(0, 12, 8), 1.0, 0, "s"))
    assert (
        made["W_g"].shape == (8, 8) and made["A"].shape == (16, 8) and made["B"].shape == (12, 16)
    )


def test_moa_takes_the_expert_of_the_domain():
    form = build("moa", n_experts=3, router_weight=0.5).form
    t, x = at_random(form), draw(7, 4, 5, SITE.d_in)
    p = np.array([softmax(t["W_g"].numpy() @ row.mean(0)) for row in x.numpy()])
    labels = [2, 0, -1, 1]
    y = form.branch(t | {"domain": torch.tensor(labels)}, x, SITE).numpy()
    for m, d in enumerate(labels):
        omega = {d: 1.0} if d >= 0 else dict(enumerate(p[m]))
        for j in range(5):
            np.testing.assert_allclose(y[m, j], mixed(t, x[m, j].numpy(), omega, 3), rtol=1e-8)
    loss = form.aux_loss(t | {"domain": torch.tensor(labels)}, x, SITE).item()
    wanted = -0.5 * np.mean([math.log(p[m, d]) for m, d in enumerate(labels) if d >= 0])
    assert loss == pytest.approx(wanted, rel=1e-9)
    assert form.aux_loss(t, x, SITE).item() == 0
    hard = build("moa", n_experts=3, hard=True).form.branch(t, x, SITE).numpy()
    wanted = expert(t, int(p[1].argmax()), 3) @ x[1, 0].numpy()
    np.testing.assert_allclose(hard[1, 0], wanted, rtol=1e-8)


def test_adamole_may_leave_a_token_to_the_base():
    form = build("adamole", max_threshold=1.0).form
    t, x = at_random(form), draw(8, 3, SITE.d_in).requires_grad_()
    t["b_tau"] = torch.full_like(t["b_tau"], 50.0)
    y = form.branch(t, x, SITE)
    assert torch.equal(y, torch.zeros_like(y))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(grad).all()
    alone = build("adamole", subtract=False).form
    t = at_random(alone)
    g = routing.router(t, x)[0].detach().numpy()
    tau = 0.125 / (1 + math.exp(-(t["W_tau"][0] @ x[0] + t["b_tau"][0]).item()))
    over = {i: g[i] for i in range(8) if g[i] > tau}
    omega = {i: w / sum(over.values()) for i, w in over.items()}
    np.testing.assert_allclose(
        alone.branch(t, x, SITE)[0].detach().numpy(), mixed(t, x[0].detach().numpy(), omega, 8)
    )


@pytest.mark.parametrize("shape", [(12, 16), (16, 12)], ids=str)
def test_goat_starts_from_slices_of_the_weight(shape):
    """s ρ B_i A_i is slice i of W; slices are disjoint and spread over the whole spectrum."""
    W, form = draw(1, *shape), build("goat", n_experts=3, rho=5.0, eta=2.0).form
    site = Site("s", shape[1], shape[0], 6)
    t = form.init(site, Evidence(W, 0.5, 0, "s"))
    U, S, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
    s = 0.5 * math.sqrt(3 * 2.0 * shape[1] / 2)  # d = 6 / 3
    for i in range(3):
        slice_ = sum(S[k] * np.outer(U[:, k], Vh[k]) for k in (4 * i, 4 * i + 1))
        np.testing.assert_allclose(s * 5.0 * expert(t, i, 3), slice_, atol=1e-10)
        balanced = t["B"].T @ t["B"] - t["A"] @ t["A"].T
        assert balanced.diagonal().abs().max() < 1e-10
    with pytest.raises(UserError, match="positive alpha"):
        form.init(site, Evidence(W, 0.0, 0, "s"))


def test_goat_residual_of_the_paper_is_the_mean_over_experts():
    form = build("goat", n_experts=4).form
    t, x = at_random(form), draw(2, 3, SITE.d_in)
    for y, row in zip(form.branch(t, x, SITE).numpy(), x.numpy(), strict=True):
        first = sum(expert(t, i, 4, "A0", "B0") for i in range(4)) / 4 @ row
        now = mixed(t, row, normalised_top(t, row, 2), 4)
        np.testing.assert_allclose(y, math.sqrt(3 * 8) * (now - first), rtol=1e-9)
    assert "W_g0" not in t


@pytest.mark.parametrize("scaling", ["module", "output"])
def test_multilora_adds_its_pairs(scaling):
    form = build("multilora", scaling=scaling).form
    t = at_random(form, lead=(2,))
    D = form.delta(t, SITE)
    for k in range(2):
        own = {n: v[k] for n, v in t.items()}
        for row in range(12):
            wanted = 0
            for i in range(3):
                c = own["scaling"][0 if scaling == "module" else row, i].item()
                wanted = wanted + c * expert(own, i, 3)[row]
            np.testing.assert_allclose(D[k, row].numpy(), wanted, rtol=1e-9)
    start = form.init(SITE, Evidence(draw(0, 12, 8), 1.0, 0, "s"))
    assert not form.delta(start, SITE).any() and start["B"].any() and start["A"].any()


def test_sira_serves_the_first_who_come():
    """C places per expert in the order of the tokens; padding takes none; training only."""
    form = build("sira", n_experts=3, top_k=1, capacity=1.0).form
    t, x = at_random(form), draw(5, 7, SITE.d_in)
    valid = torch.tensor([1.0, 0, 1, 1, 1, 1, 1], dtype=torch.float64)
    kept = torch.ones(7, 3, dtype=torch.float64)
    kept[4, best(probabilities(t, x[4].numpy()), 1)[0]] = 0
    y = form.branch(t | {"kept": kept, "valid": valid}, x, SITE).numpy()
    served, dropped = [0, 0, 0], 0
    for n, row in enumerate(x.numpy()):
        G = probabilities(t, row) * kept[n].numpy()
        (e,) = best(G, 1)
        served[e] += int(valid[n])
        if valid[n] and served[e] > math.ceil(6 / 3):
            dropped += 1
            assert not y[n].any()
        elif valid[n]:
            np.testing.assert_allclose(y[n], G[e] * expert(t, e, 3) @ row, rtol=1e-9)
    assert dropped, "no expert was full: the test shows nothing"
    assert form.branch(t, x, SITE).any(-1).all()


def test_sira_loss_and_draws():
    form = build("sira", balance=0.4, expert_dropout=0.25).form
    t, x = at_random(form), draw(5, 6, SITE.d_in)
    kept = form.draw(SITE, 2000, torch.Generator().manual_seed(0))["kept"]
    assert sorted(kept.unique().tolist()) == pytest.approx([0, 4 / 3])
    assert kept.mean().item() == pytest.approx(1.0, abs=0.02)
    t["kept"] = kept[:6].double()
    c, m = np.zeros(16), np.zeros(16)
    for n, row in enumerate(x.numpy()):
        G = probabilities(t, row) * t["kept"][n].numpy()
        m += G / 6
        for e in best(G, 4):
            c[e] += G[e] > 0
    wanted = 0.4 * np.mean(c / 6 * m)
    assert form.aux_loss(t, x, SITE).item() == pytest.approx(wanted, rel=1e-6)


def test_mixlora_has_plain_lora_in_attention():
    form = build("mixlora").form
    site = Site("layers.0.self_attn.q_proj", 8, 12, 2)
    t, x = at_random(form, site, (2,)), draw(1, 2, 3, 8)
    assert t["A"].shape == (2, 2, 8) and set(t) == {"A", "B"}
    torch.testing.assert_close(form.branch(t, x, site), x @ (t["B"] @ t["A"]).mT)
    assert torch.equal(form.aux_loss(t, x, site), torch.zeros(2, dtype=torch.float64))


class Masked(nn.Module):
    """A layer that is called as transformers' models are."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 12, bias=False)
        self.up.weight.data.copy_(draw(0, 12, 8))

    def forward(self, x, attention_mask=None):
        return self.up(x)


def adapted(name, **settings):
    adapter = adapt(Masked(), build(name, **settings), rank=2)
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.copy_(draw(i + 1, *p.shape))
    return adapter


@pytest.mark.parametrize("name", sorted(set(ROUTED) - {"moa"}))
def test_losses_belong_to_training_and_leave_padding_out(name):
    # The number of experts of a model without blocks is that of MoLA's lowest: take more.
    more = {"mola": {"experts": "4"}, "moelora": {"contrast": 0.0}, "sira": {"expert_dropout": 0.0}}
    adapter = adapted(name, **more.get(name, {}))
    x, mask = draw(5, 3, 4, 8).float(), torch.ones(3, 4)
    mask[:, 3] = 0
    adapter.model(x[:, :3], attention_mask=mask[:, :3])
    wanted = adapter.penalty()
    assert wanted is not None and wanted > 0
    adapter.model(x, attention_mask=mask)
    torch.testing.assert_close(adapter.penalty(), wanted)
    adapter.model(x)
    assert not torch.equal(adapter.penalty(), wanted), "the mask changes nothing"
    adapter.model.eval()
    adapter.model(x, attention_mask=mask)
    assert adapter.penalty() is None


def test_domains_are_given_through_the_adapter():
    adapter = adapted("moa", n_experts=3)
    t = {n.rpartition(".")[2]: p[0].detach() for n, p in adapter.pack.trainable().items()}
    x, W = draw(5, 2, 4, 8).float(), adapter.model.up.weight.detach().numpy()
    with adapter.given(domain=torch.tensor([2, 0])):
        y = adapter.model(x)
        assert adapter.penalty() > 0
    for m, d in enumerate([2, 0]):
        wanted = x[m].numpy() @ (W + expert(t, d, 3)).T
        np.testing.assert_allclose(y[m].detach().numpy(), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(adapter.model(x), y)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("moelora", {"n_experts": 0}, "n_experts of MoELoRA must be a whole number from 1 on"),
        ("moelora", {"top_k": 9}, "top_k of MoELoRA is from 1 to its 8 experts, not 9"),
        ("moelora", {"temperature": 0.0}, "temperature of MoELoRA must be positive"),
        ("mixlora", {"balance": -1.0}, "balance of MixLoRA must be at least 0"),
        ("mola", {"experts": "2;4"}, "experts of MoLA are numbers from 1 on with commas"),
        ("mola", {"experts": "0,4"}, "experts of MoLA are numbers from 1 on.* not '0,4'"),
        ("lora_moe", {"n_types": 7}, "n_types of LoRAMoE is from 1"),
        (
            "lora_moe",
            {"imbalance": 2.0},
            "imbalance of LoRAMoE must be a share, in .0, 1., not 2.0",
        ),
        ("adamole", {"max_threshold": 2.0}, "max_threshold of AdaMoLE must be a share, .* not 2.0"),
        ("goat", {"rho": 0.0}, "rho of GOAT must be positive"),
        ("goat", {"residual": "none"}, "residual of GOAT cannot be 'none'; it is 'mean' or"),
        ("sira", {"capacity": 0.0}, "capacity of SiRA must be positive"),
        ("sira", {"expert_dropout": 1.0}, "expert_dropout of SiRA must be in .0, 1., not 1.0"),
        ("multilora", {"n_modules": 0}, "n_modules of MultiLoRA must be a whole number"),
        ("multilora", {"scaling": "none"}, "scaling of MultiLoRA cannot be 'none'; it is"),
    ],
)
def test_mistakes_get_one_sentence(name, settings, words):
    with pytest.raises(UserError, match=words):
        build(name, **settings)
