"""Every Form against the paper's formula in loops, under any pack axes; and AdaLoRA's budget."""

import dataclasses

import numpy as np
import pytest
import torch

from loralab.errors import UserError
from loralab.methods import all_methods, build
from loralab.recipe import Evidence, Site, SiteState
from tests.methods import reference

SHAPES = [(12, 8, 4), (8, 12, 4), (10, 10, 4)]
LEADS = [(), (3,), (2, 2)]

FORMS = {type(m.recipe.form).__name__: m.recipe.form for m in all_methods().values()}
# The Forms of later groups have their loops in the group's own file.
VARIANTS = {
    **{n: f for n, f in FORMS.items() if n in {**reference.FORMS, **reference.BRANCHES, "DoRA": 0}},
    "GraLoRA hybrid": build("gralora", hybrid_rank=2).form,
    "GraLoRA k=1": build("gralora", k=1).form,
    "HydraLoRA 2 heads": build("hydralora", n_heads=2).form,
}


def random_tensors(form, site, lead=(), seed=0):
    """Tensors of the shapes that the form makes, at a generic point."""
    evidence = Evidence(torch.ones(site.d_out, site.d_in, dtype=torch.float64), 1.0, 0, "s")
    g = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(*lead, *v.shape, generator=g, dtype=torch.float64)
        for n, v in form.init(site, evidence).items()
    }


def slots(t, lead):
    """Yield (index, tensors of one slot as numpy)."""
    for index in np.ndindex(lead):
        yield index, {n: v[index].numpy() for n, v in t.items()}


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_form_equals_the_loops(name, shape, lead):
    form, site = VARIANTS[name], Site("s", shape[1], shape[0], shape[2])
    kind = type(form).__name__
    t = random_tensors(form, site, lead)
    x = torch.randn(*lead, 5, site.d_in, dtype=torch.float64)
    y = form.branch(t, x, site)
    assert y.shape == (*lead, 5, site.d_out)
    W = np.random.default_rng(0).normal(size=(site.d_out, site.d_in))
    for index, own in slots(t, lead):
        if kind in reference.BRANCHES:
            wanted = [reference.BRANCHES[kind](own, row, 1.0) for row in x[index].numpy()]
            np.testing.assert_allclose(y[index].numpy(), np.array(wanted), rtol=1e-9, atol=1e-12)
        elif type(form).gain.__qualname__ == "Form.gain":
            wanted = reference.FORMS[kind](own, W, 1.0)
            np.testing.assert_allclose(form.delta(t, site)[index].numpy(), wanted, atol=1e-11)
            np.testing.assert_allclose(y[index].numpy(), x[index].numpy() @ wanted.T, atol=1e-10)


@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_dora_rescales_rows(lead):
    form, site = FORMS["DoRA"], Site("s", 8, 12, 4)
    t = random_tensors(form, site, lead)
    W = torch.randn(12, 8, dtype=torch.float64)
    V = W + 0.5 * form.delta(t, site)
    adapted = form.gain(t, V.norm(dim=-1)).unsqueeze(-1) * V
    for index, own in slots(t, lead):
        wanted = W.numpy() + reference.dora(own, W.numpy(), 0.5)
        np.testing.assert_allclose(adapted[index].numpy(), wanted, rtol=1e-9)


@pytest.mark.parametrize("shape", [(6, 10, 2), (10, 6, 2), (6, 6, 4)], ids=str)
@pytest.mark.parametrize("name", ["VeRA", "RandLoRA"])
def test_shared_tensors_are_cut_to_the_site(name, shape):
    """Tensors made for the largest layer give what the cut tensors give."""
    form, site = FORMS[name], Site("s", shape[1], shape[0], shape[2])
    t = random_tensors(form, site)
    big = random_tensors(form, Site("shared", 16, 16, shape[2]), seed=1)
    for n in form.shared:
        big[n][tuple(slice(0, k) for k in t[n].shape)] = t[n]
    shared = {n: big[n] for n in form.shared}
    x = torch.randn(3, site.d_in, dtype=torch.float64)
    for t2 in (t, {**t, **shared}):
        wanted = reference.FORMS[name]({n: v.numpy() for n, v in t.items()}, np.zeros(shape[:2]), 1)
        np.testing.assert_allclose(form.delta(t2, site).numpy(), wanted, atol=1e-11)
        np.testing.assert_allclose(
            form.branch(t2, x, site).numpy(), x.numpy() @ wanted.T, atol=1e-10
        )


def test_loha_is_cheap_by_either_path():
    """Both paths of `branch`, on either side of r² (m + n) = m n, give (B1 A1) ∘ (B2 A2)."""
    form = FORMS["LoHa"]
    for rank in (2, 6):
        site = Site("s", 16, 16, rank)
        assert (rank**2 * 32 < 256) == (rank == 2)
        t, x = random_tensors(form, site), torch.randn(3, 16, dtype=torch.float64)
        D = (t["B1"] @ t["A1"]) * (t["B2"] @ t["A2"])
        torch.testing.assert_close(form.branch(t, x, site), x @ D.mT)


def test_gralora_names_the_site_that_it_cannot_divide():
    evidence = Evidence(torch.zeros(12, 9), 1.0, 0, "layers.0.up")
    with pytest.raises(UserError, match=r"layers\.0\.up: its inputs \(9\)"):
        FORMS["GraLoRA"].init(Site("layers.0.up", 9, 12, 4), evidence)
    with pytest.raises(UserError, match="its rank"):
        FORMS["GraLoRA"].init(Site("layers.0.up", 8, 12, 3), evidence)


def test_gralora_rank_grows_with_k():
    """Section 3: rank up to k r at LoRA's parameter count."""
    site = Site("s", 16, 16, 4)
    for k, rank in ((1, 4), (2, 8), (4, 16)):
        form = build("gralora", k=k).form
        t = random_tensors(form, site)
        assert torch.linalg.matrix_rank(form.delta(t, site)) == rank
        assert sum(v.numel() for v in t.values()) == 4 * (16 + 16)


def test_penalty_is_the_papers():
    form, site = build("adalora").form, Site("s", 8, 12, 4)
    t = random_tensors(form, site, (3,))
    for k, own in slots(t, (3,)):
        P, Q = own["P"], own["Q"]
        gaps = [P.T @ P - np.eye(6), Q @ Q.T - np.eye(6)]
        wanted = form.gamma * sum((gap**2).sum() for gap in gaps)
        assert form.penalty(t, site)[k].item() == pytest.approx(wanted)


def test_adalora_starts_from_normal_vectors_of_deviation_one_fiftieth():
    """N(0, 0.02²) and λ = 0, at the form's own and not the rank's size."""
    W = torch.zeros(300, 200)
    t = build("adalora").form.init(Site("s", 200, 300, 40), Evidence(W, 1.0, 0, "s"))
    assert t["P"].shape == (300, 60) and t["Q"].shape == (60, 200)
    for vectors in (t["P"], t["Q"]):
        assert vectors.std().item() == pytest.approx(0.02, rel=0.03)
        assert vectors.mean().item() == pytest.approx(0, abs=1e-3)
        # Normal, not uniform of that deviation: 3 for the first, 9/5 for the second.
        assert (vectors / 0.02).pow(4).mean().item() == pytest.approx(3, abs=0.3)
    assert torch.equal(t["Lambda"], torch.zeros(60))


class Unsized(SiteState):
    """A site that keeps its size, so that every triplet stays in its place."""

    def resize(self, index):
        self.kept = [{i for i in own if i >= 0} for own in index.tolist()]


def ada_sites(lead=3, seed=0):
    form, g = build("adalora").form, torch.Generator().manual_seed(seed)
    sites = []
    for d_in, d_out, rank in ((8, 12, 4), (6, 6, 2)):
        state = Unsized()
        state.site, state.state = Site(f"s{rank}", d_in, d_out, rank), {}
        state.scale = torch.ones(lead, dtype=torch.float64)
        state.t = random_tensors(form, state.site, (lead,), seed)
        state.g = {n: torch.randn(v.shape, generator=g, dtype=v.dtype) for n, v in state.t.items()}
        sites.append(state)
    return sites, g


def test_adalora_prunes_as_the_naive_allocator():
    """Importance, global ranking per slot and cubic budget against number-by-number loops."""
    n_steps, K = 40, 3
    schedule = dataclasses.replace(build("adalora").schedule, interval=2 / n_steps)
    sites, g = ada_sites(K)
    history = [[[] for _ in sites] for _ in range(K)]
    for step in range(20):  # then the dropped triplets are gone
        t = step + 1
        for i, site in enumerate(sites):
            for n, v in site.t.items():
                site.g[n] = torch.randn(v.shape, generator=g, dtype=v.dtype)
                v += 0.1 * torch.randn(v.shape, generator=g, dtype=v.dtype)
            for k in range(K):
                now = [{n: v[k].numpy().copy() for n, v in d.items()} for d in (site.t, site.g)]
                history[k][i].append(tuple(now))
        before = [site.t["Lambda"].clone() for site in sites]
        schedule.after_step(sites, step, n_steps)
        if t <= 4 or t % 2:
            continue
        keep = reference.ada_budget(t if t < 20 else n_steps, n_steps, 4, 20, 9, 6)
        for k in range(K):
            scores = [reference.ada_importance(h, 0.85, 0.85) for h in history[k]]
            threshold = np.sort(np.concatenate(scores))[::-1][keep - 1]
            for site, old, score in zip(sites, before, scores, strict=True):
                alive = torch.from_numpy((score >= threshold).astype(float))
                torch.testing.assert_close(site.t["Lambda"][k], old[k] * alive)
            if t == 20:
                kept = [site.kept[k] for site in sites]
                assert kept == [set(site.t["Lambda"][k].nonzero()[:, 0].tolist()) for site in sites]
                assert sum(map(len, kept)) == 4 + 2


def test_adalora_budget_is_cubic():
    schedule = build("adalora").schedule
    for step in range(100):
        wanted = reference.ada_budget(step + 1, 100, 10, 50, 48, 32)
        assert schedule.budget(step, 100, 48, 32) == wanted
    assert schedule.budget(0, 100, 48, 32) == 48 and schedule.budget(99, 100, 48, 32) == 32
