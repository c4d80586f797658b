"""Ranks that grow, shrink and move: each method's formula in loops, on sites of our own making."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from loralab.core.change import rank_axes
from loralab.errors import UserError
from loralab.methods import build
from loralab.methods.budgeting import _ranks as ranks
from loralab.methods.budgeting._ablation import ablation
from loralab.recipe import Evidence, Hyper, Site, SiteState
from loralab.testing.toy import RANK, ToyModel, ToyTask, slot_tensors, toy_trial, train
from loralab.training.loop import _Run

K = 2
SIZES = ((8, 12), (9, 10), (12, 7))


class Running(SiteState):
    """A site with its own plain resize; its gradients come from a dense G."""

    def __init__(self, form, j, rank=4, seed=0):
        d_in, d_out = SIZES[j]
        self.site, self.form = Site(f"s{j}", d_in, d_out, rank), form
        self.axes = dict(form.rank_axis) or {"A": -2, "B": -1}
        self.state, self.seeds = {}, [7 + k for k in range(K)]
        self.scale = torch.ones(K, dtype=torch.float64)
        self.random = torch.Generator().manual_seed(100 * seed + j)
        W = torch.zeros(d_out, d_in, dtype=torch.float64)
        made = [form.init(self.site, Evidence(W, 1.0, k, f"s{j}")) for k in range(K)]
        own = {n: torch.stack([m[n] for m in made]) for n in made[0]}
        self.fixed = {n: own.pop(n) for n in form.frozen}
        self.t = own
        self.widths = [self.width]
        self.look()

    @property
    def width(self):
        name, axis = next(iter(self.axes.items()))
        return self.t[name].shape[axis]

    def dense(self):
        B, A = self.form.factors(self.t | self.fixed, self.site)
        return B @ A

    def look(self):
        """Draw a dense G and set every gradient from it by autograd."""
        G = torch.randn(K, *self.dense().shape[1:], generator=self.random, dtype=torch.float64)
        t = {n: v.clone().requires_grad_() for n, v in self.t.items()}
        B, A = self.form.factors(t | self.fixed, self.site)
        grads = torch.autograd.grad((G * (B @ A)).sum(), list(t.values()), allow_unused=True)
        self.G = G
        self.g = {
            n: torch.zeros_like(v) if g is None else g
            for (n, v), g in zip(t.items(), grads, strict=True)
        }

    def shake(self, size=0.3):
        """Move every tensor, but leave padding at zero."""
        for n, v in self.t.items():
            used = self.state.get("alive", torch.ones(K, self.width, dtype=torch.float64))
            used = used if v.dim() == 2 else used.unsqueeze(-2 if self.axes[n] == -1 else -1)
            v += size * used * torch.randn(v.shape, generator=self.random, dtype=v.dtype)

    def resize(self, index):
        for n, axis in self.axes.items():
            old = self.t[n].movedim(axis, 1)
            new = old.new_zeros(K, index.shape[1], *old.shape[2:])
            for k in range(K):
                for i, at in enumerate(index[k].tolist()):
                    if at >= 0:
                        new[k, i] = old[k, at]
            self.t[n] = new.movedim(1, axis).contiguous()
            self.g[n] = torch.zeros_like(self.t[n])
        self.widths.append(index.shape[1])


def sites_of(name, rank=4, **settings):
    recipe = build(name, **settings)
    return recipe, [Running(recipe.form, j, rank) for j in range(len(SIZES))]


def test_regrow_keeps_each_slots_own_ranks_in_order():
    _, (site, *_) = sites_of("lora")
    site.shake()
    site.state["own"] = torch.arange(8.0, dtype=torch.float64).view(K, 4) + 1
    before = {n: v.clone() for n, v in site.t.items()}
    keep = torch.tensor([[True, False, True, False], [False, False, False, True]])
    fresh = ranks.regrow(site, keep, torch.tensor([0, 2]), {"own": -1})
    assert site.width == 3 and fresh.tolist() == [[False] * 3, [False, True, True]]
    assert site.state["alive"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert site.state["own"].tolist() == [[1, 3, 0], [8, 0, 0]]
    for k, kept in ((0, [0, 2]), (1, [3])):
        n = len(kept)
        assert torch.equal(site.t["A"][k, :n], before["A"][k, kept])
        assert torch.equal(site.t["B"][k, :, :n], before["B"][k][:, kept])
        assert not site.t["A"][k, n:].any() and not site.t["B"][k, :, n:].any()


def test_a_site_keeps_one_rank_of_zeros_when_it_loses_all():
    _, (site, *_) = sites_of("lora")
    ranks.regrow(site, torch.zeros(K, 4))
    assert site.width == 1 and not site.t["A"].any() and not site.state["alive"].any()


def test_adalora_drops_what_is_outside_the_final_pattern():
    recipe, sites = sites_of("adalora", interval=0.05)
    schedule, n_steps, budget = recipe.schedule, 40, 18
    for step in range(n_steps):
        for site in sites:
            site.shake(0.1)
            site.look()
        schedule.after_step(sites, step, n_steps)
        if 4 < step + 1 <= 20 and (step + 1) % 2 == 0:
            budget = schedule.budget(step, n_steps, 18, 12)
        assert torch.stack(schedule.ranks(sites)).sum(0).tolist() == [budget] * K
        for site in sites:
            assert len(site.widths) == (1 if step < 19 else 2)
            assert ((site.t["Lambda"] != 0).sum(-1) <= schedule.ranks([site])[0]).all()
    assert sum(site.width for site in sites) < 18
    assert not any(key.startswith(("mean.", "spread.")) for s in sites for key in s.state)


def test_adaloras_last_pruning_changes_nothing_but_the_size():
    recipe, sites = sites_of("adalora", interval=1.0)
    for step in range(20):
        for site in sites:
            site.shake(0.1)
            site.look()
        last = [{n: v.clone() for n, v in site.t.items()} for site in sites]
        recipe.schedule.after_step(sites, step, 40)
    for site, old in zip(sites, last, strict=True):
        for k in range(K):
            norms = (old["P"][k] * old["Lambda"][k]) @ old["Q"][k] - site.dense()[k]
            gone = 6 - int(recipe.schedule.ranks([site])[0][k])
            assert np.linalg.matrix_rank(norms.numpy()) == gone


def naive_increlora_importance(site, k):
    """I from the dense update and its dense gradient, entry by entry."""
    product = (site.dense()[k] * site.G[k]).numpy()
    rows = sum(abs(sum(row)) for row in product)
    columns = sum(abs(sum(column)) for column in product.T)
    return (rows + columns) / 2 / math.sqrt(product.size)


def test_increlora_scores_modules_by_the_dense_update_and_its_gradient():
    recipe, sites = sites_of("increlora")
    mean, spread = np.zeros((K, 3)), np.zeros((K, 3))
    for _ in range(4):
        for j, site in enumerate(sites):
            site.shake()
            site.look()
            now = recipe.schedule.importance(site)
            for k in range(K):
                wanted = naive_increlora_importance(site, k)
                assert now[k].item() == pytest.approx(wanted)
                mean[k, j] = 0.85 * mean[k, j] + 0.15 * wanted
                spread[k, j] = 0.85 * spread[k, j] + 0.15 * abs(wanted - mean[k, j])
    for j, site in enumerate(sites):
        np.testing.assert_allclose(site.state["mean"], mean[:, j])
        np.testing.assert_allclose(site.state["spread"], spread[:, j])


def test_increlora_grows_to_the_rank_asked_for():
    recipe, sites = sites_of("increlora", interval=0.05, share=0.3)
    schedule, n_steps, history = recipe.schedule, 60, []
    assert [site.width for site in sites] == [1, 1, 1]
    for step in range(n_steps):
        for site in sites:
            site.look()
        schedule.before_step(sites, step, n_steps)
        for site in sites:
            if "main" in site.state:
                assert not site.g["Lambda"][site.state["main"] == 0].any()
            site.shake(0.1)
        schedule.after_step(sites, step, n_steps)
        history.append(torch.stack(schedule.ranks(sites)).sum(0).tolist())
        for site in sites:
            reserve = (site.state["alive"] - site.state["main"]).bool()
            assert (site.t["Lambda"][reserve] == 1e-5).all()
            assert all(not v.any() for v in padding(site))
    assert history[0] == [3, 3] and history[-1] == [12, 12]
    steps = {b[0] - a[0] for a, b in itertools.pairwise(history)}
    assert steps == {0, 2, 1}  # half the rank at a time, and what is left at the end
    assert not any((s.state["alive"] != s.state["main"]).any() for s in sites)


def test_increlora_ends_a_slots_growth_whatever_its_neighbour_does():
    recipe, sites = sites_of("increlora", interval=0.05, share=0.3)
    for step in range(60):
        for site in sites:
            site.look()
            for g in site.g.values():
                g[1] = torch.nan  # a diverged trial: no module of it is important
        recipe.schedule.before_step(sites, step, 60)
        recipe.schedule.after_step(sites, step, 60)
    assert torch.stack(recipe.schedule.ranks(sites)).sum(0).tolist() == [12, 3]
    assert all(torch.equal(s.state["alive"][0], s.state["main"][0]) for s in sites)


def padding(site):
    """Return the parts of every tensor that belong to no rank of the slot."""
    for k in range(K):
        n = int(site.state["alive"][k].sum())
        for name, axis in site.axes.items():
            yield site.t[name].movedim(axis, 1)[k, n:]


def test_increloras_new_parameters_warm_up():
    recipe, sites = sites_of("increlora", warmup=0.5, interval=1.0)
    schedule, n_steps, (site, *_) = recipe.schedule, 20, sites
    for step in range(4):
        for s in sites:
            s.look()
        schedule.before_step(sites, step, n_steps)
        before = {n: v.clone() for n, v in site.t.items()}
        for s in sites:
            for v in s.t.values():
                v += 1.0
        schedule.after_step(sites, step, n_steps)
        if step == 0:  # the reserve comes after the first step
            assert site.width == 3
            continue
        moved = site.t["Q"] - before["Q"]
        part = (step + 1) / 10
        torch.testing.assert_close(moved[:, 0], torch.ones_like(moved[:, 0]))
        torch.testing.assert_close(moved[:, 1:], torch.full_like(moved[:, 1:], part))


def test_elalora_moves_ranks_and_takes_only_the_pruned_triplets_away():
    recipe, sites = sites_of("elalora", b=2, decays=False, interval=0.1, t_initial=0.2, t_final=0.5)
    schedule, n_steps = recipe.schedule, 20
    for step in range(n_steps):
        for site in sites:
            site.shake(0.1)
            site.look()
        old = [{n: v.clone() for n, v in site.t.items()} for site in sites]
        widths = [len(site.widths) for site in sites]
        scores = None
        if step + 1 > 4 and step + 1 < 10 and (step + 1) % 2 == 0:
            scores = naive_scores(schedule, sites)
        schedule.after_step(sites, step, n_steps)
        changed = [len(site.widths) != n for site, n in zip(sites, widths, strict=True)]
        assert any(changed) == (scores is not None)
        assert torch.stack(schedule.ranks(sites)).sum(0).tolist() == [12, 12]
        if step + 1 <= 4:  # nothing is gathered in the warm-up
            assert not any(key.startswith(("mean.", "spread.")) for s in sites for key in s.state)
        if scores is None:
            continue
        for k in range(K):
            pruned, grown = naive_moves(scores[k], k=2, b=2)
            for j, site in enumerate(sites):
                gone = [i for s, i in pruned if s == j]
                n = len(scores[k][j]) - len(gone)
                left = [i for i in range(len(scores[k][j])) if i not in gone]
                assert int(schedule.ranks([site])[0][k]) == n + grown.count(j)
                dense = (old[j]["P"][k][:, left] * old[j]["Lambda"][k][left]) @ old[j]["Q"][k][left]
                torch.testing.assert_close(site.dense()[k], dense)
                for new in range(n, n + grown.count(j)):
                    assert site.t["Lambda"][k, new] == 0
                    for V in (site.t["P"][k].mT, site.t["Q"][k]):
                        assert V[new].norm().item() == pytest.approx(1)
                        assert (V[:new] @ V[new]).abs().max() < 1e-12


def naive_scores(schedule, sites):
    """Return ElaLoRA's importance [slot][site][rank], one step further, number by number."""
    found = [[[] for _ in sites] for _ in range(K)]
    for j, site in enumerate(sites):
        for k in range(K):
            for i in range(int(site.state["alive"][k].sum())):
                total = 0.0
                for name, axis in site.axes.items():
                    pick = lambda v, a=axis, i=i, k=k: v.movedim(a, 1)[k, i].flatten()  # noqa: E731
                    now = (pick(site.t[name]) * pick(site.g[name])).abs()
                    mean = 0.85 * pick(site.state["mean." + name]) + 0.15 * now
                    spread = 0.85 * pick(site.state["spread." + name]) + 0.15 * (now - mean).abs()
                    total += float((mean * spread).mean())
                found[k][j].append(total)
    return found


def naive_moves(scores, k, b):
    pool = []
    for j, own in enumerate(scores):
        order = sorted(range(len(own)), key=lambda i: own[i])
        pool += [(own[i], j, i) for i in order[: min(k, len(own) - 1)]]
    pool.sort()
    # A module grows only if k more would fit.
    grown = [j for _, j, _ in pool[-b:] if len(scores[j]) + k <= min(SIZES[j])]
    return [(j, i) for _, j, i in pool[: len(grown)]], grown


def test_elalora_moves_no_ranks_of_a_diverged_trial():
    recipe, sites = sites_of("elalora")
    assert recipe.schedule.choose(sites, [torch.full((4,), torch.nan)] * 3, 4) == ([], [])


def test_elalora_does_not_let_rounding_move_new_directions():
    """λ = 0 and orthonormal rows: the gradient of a new P or Q is 0 but for rounding."""
    recipe, sites = sites_of("elalora", interval=0.1)
    for site in sites:
        site.shake()
        site.t["Lambda"][:, 3] = 0
        site.look()
    old = [{n: g.clone() for n, g in site.g.items()} for site in sites]
    recipe.schedule.before_step(sites, 3, 20)  # still in the warm-up, where all λ begin at 0
    assert all(
        torch.equal(s.g[n], g) for s, o in zip(sites, old, strict=True) for n, g in o.items()
    )
    recipe.schedule.before_step(sites, 4, 20)
    for site, before in zip(sites, old, strict=True):
        assert not site.g["P"][..., 3].any() and not site.g["Q"][:, 3].any()
        assert torch.equal(site.g["P"][..., :3], before["P"][..., :3])
        assert torch.equal(site.g["Q"][:, :3], before["Q"][:, :3])
        assert torch.equal(site.g["Lambda"], before["Lambda"])


def test_elaloras_b_falls_as_a_cubic():
    schedule = build("elalora").schedule
    assert [schedule.moved(t - 1, 100) for t in (15, 30, 60, 80)] == [4, 4, 3, 0]
    for t in range(15, 81):
        assert schedule.moved(t - 1, 100) == round(4 * (1 - ((t - 15) / 65) ** 3))


@pytest.mark.parametrize("times_lr", [False, True])
def test_soras_step_is_adamw_and_a_soft_threshold_on_the_gates(times_lr):
    recipe, (site, *_) = sites_of("sora", xi=0.02, times_lr=times_lr)
    plain = build("lora").rule
    site.shake(0.05)
    lr = torch.tensor([1e-2, 0.0], dtype=torch.float64)
    decay = torch.full_like(lr, 0.1)
    other = Running(recipe.form, 0)
    other.t = {n: v.clone() for n, v in site.t.items()}
    gates = []
    for _ in range(3):
        site.look()
        other.g = {n: g.clone() for n, g in site.g.items()}
        other.t["gate"].copy_(site.t["gate"])
        recipe.rule.step([site], Hyper(lr, decay))
        plain.step([other], Hyper(lr, decay * 0))
        xi = 0.02 * 1e-2 if times_lr else 0.02
        for i in range(4):
            x = float(other.t["gate"][0, i])
            wanted = x - xi if x > xi else x + xi if x < -xi else 0.0
            assert site.t["gate"][0, i].item() == pytest.approx(wanted, abs=1e-15)
        gates.append(site.t["gate"].clone())
    assert torch.equal(gates[0][1], gates[2][1]), "a slot with learning rate 0 has moved"


@pytest.mark.parametrize(("name", "gate"), [("sora", "gate"), ("salora", "log_alpha")])
def test_closed_ranks_leave_at_the_end_and_the_function_stays(name, gate):
    recipe, (site, *_) = sites_of(name)
    site.shake()
    closed = torch.tensor([[True, False, True, False], [False, True, False, False]])
    closed = torch.nn.functional.pad(closed, (0, site.width - 4))
    site.t[gate][closed] = 0.0 if name == "sora" else -4.0
    before = site.dense()
    recipe.schedule.after_step([site], 3, 10)
    assert len(site.widths) == 1
    wanted = (~closed).sum(-1)
    assert torch.equal(recipe.schedule.ranks([site])[0], wanted)
    recipe.schedule.after_step([site], 9, 10)
    assert site.width == int(wanted.max())
    torch.testing.assert_close(site.dense(), before)
    assert torch.equal(recipe.schedule.ranks([site])[0], wanted)


def test_saloras_gates_are_hard_concrete():
    form = build("salora").form
    log_alpha, u = torch.linspace(-4, 4, 9).double(), torch.linspace(0.05, 0.95, 9).double()
    noisy, calm = form.gates({"log_alpha": log_alpha, "u": u}), form.gates({"log_alpha": log_alpha})
    sigmoid = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    for i, (a, v) in enumerate(zip(log_alpha.tolist(), u.tolist(), strict=True)):
        s = sigmoid(math.log(v / (1 - v)) + a)
        assert noisy[i].item() == pytest.approx(min(1, max(0, s * 1.2 - 0.1)))
        assert calm[i].item() == pytest.approx(min(1, max(0, sigmoid(a) * 1.2 - 0.1)))


def test_saloras_constraint_is_on_all_sites_together_and_its_multiplier_ascends():
    recipe, sites = sites_of("salora", beta=3.0)
    for site in sites:
        site.shake()
        site.g = {n: torch.zeros_like(v) for n, v in site.t.items()}
    leaves = [site.t["log_alpha"].clone().requires_grad_() for site in sites]
    shift = math.log(0.1 / 1.1)
    mean = torch.cat([leaf - shift for leaf in leaves], -1).sigmoid().mean(-1)
    gap = (mean - 4 / 6).square()
    wanted = torch.autograd.grad(3.0 * gap.sum(), leaves)
    recipe.schedule.before_step(sites, 0, 10)
    for site, grad in zip(sites, wanted, strict=True):
        torch.testing.assert_close(site.g["log_alpha"], grad)
        assert not site.g["A"].any()
    torch.testing.assert_close(sites[0].state["beta"], 3.0 + gap.detach())


def test_salora_meets_its_budget_and_shrinks():
    trained = train([toy_trial("salora", steps=120, lr=2e-2)])
    left = [bank.schedule.open(state) for bank, state in running(trained)]
    total = sum(int(mask.sum()) for mask in left)
    assert 10 <= total <= 14, "the budget is 12 of 18 ranks"
    assert sum(bank.tensors()["A"].shape[-2] for bank, _ in running(trained)) == total


def running(trained):
    """Return the banks of a trained pack with a site state for each."""
    found = []
    for _, bank in trained.pack.banks():
        state = SiteState()
        state.t = {n: v.detach() for n, v in bank.tensors().items()}
        state.site, state.state = bank.site, {}
        found.append((bank, state))
    return found


def test_dylora_uses_the_first_b_ranks_at_alpha_over_b():
    form, site = build("dylora").form, Site("s", 5, 7, 6)
    g, seen = torch.Generator().manual_seed(0), []
    A, B = (torch.randn(*shape, dtype=torch.float64, generator=g) for shape in ((6, 5), (7, 6)))
    for _ in range(600):
        drawn = form.draw(site, 3, g)
        b = int((drawn["weights"] > 0).sum())
        seen.append(b)
        left, right = form.factors({"A": A, "B": B, **drawn}, site)
        wanted = sum(torch.outer(B[:, i], A[i]) for i in range(b)) * 6 / b
        torch.testing.assert_close(left @ right, wanted)
    assert np.bincount(seen, minlength=7)[1:].min() > 60  # of 100 expected
    left, right = form.factors({"A": A, "B": B}, site)
    torch.testing.assert_close(left @ right, B @ A)


def test_dylora_trains_only_the_last_rank_when_asked_to():
    form, site = build("dylora", last_only=True).form, Site("s", 5, 7, 6)
    g = torch.Generator().manual_seed(1)
    drawn = form.draw(site, 3, g)
    b = int((drawn["weights"] > 0).sum())
    t = {"A": torch.randn(6, 5, requires_grad=True), "B": torch.randn(7, 6, requires_grad=True)}
    left, right = form.factors(t | drawn, site)
    (left @ right).square().sum().backward()
    for grad in (t["A"].grad, t["B"].grad.mT):
        assert [i for i in range(6) if grad[i].any()] == [b - 1]


def test_dylora_draws_one_b_for_the_whole_model(monkeypatch):
    seen = {}
    draw = type(build("dylora").form).draw

    def watched(self, site, n, generator):
        drawn = draw(self, site, n, generator)
        seen.setdefault(site.name, []).append(int((drawn["weights"] > 0).sum()))
        return drawn

    monkeypatch.setattr(type(build("dylora").form), "draw", watched)
    train([toy_trial("dylora", steps=12)])
    up, mid, down = seen.values()
    assert up == mid == down and len(up) == 12 and len(set(up)) > 2


def test_dyloras_geometric_draw_prefers_few_ranks():
    form, g = build("dylora", p=0.5).form, torch.Generator().manual_seed(0)
    drawn = [form.draw(Site("s", 5, 7, 4), 1, g)["weights"] for _ in range(400)]
    counts = np.bincount([int((w > 0).sum()) for w in drawn], minlength=5)[1:]
    np.testing.assert_allclose(counts / 400, np.array([8, 4, 2, 1]) / 15, atol=0.07)


def test_dylora_is_cut_at_the_end_at_alpha_over_b():
    recipe, (site, *_) = sites_of("dylora", keep=3)
    site.shake()
    A, B = site.t["A"].clone(), site.t["B"].clone()
    recipe.schedule.after_step([site], 8, 10)
    assert site.width == 4
    recipe.schedule.after_step([site], 9, 10)
    assert site.width == 3
    torch.testing.assert_close(site.dense(), B[..., :3] @ A[:, :3] * 4 / 3)


def naive_beam(sites, tau, share, k):
    """Return the pruned (site, rank) of one slot by the sorted running sum, and all s'."""
    s = [torch.softmax(site.t["gate"][k] / tau, -1) * site.width for site in sites]
    every = sorted(((-float(v), j, i) for j, own in enumerate(s) for i, v in enumerate(own)))
    pruned, total = [], 0.0
    for value, j, i in every:
        total -= value
        if total > share * 12:
            pruned.append((j, i))
    return pruned, s


def test_beamlora_prunes_by_top_p_and_expands_the_strongest_from_their_past():
    recipe, sites = sites_of("beamlora", interval=0.2, p=0.7)
    schedule, n_steps = recipe.schedule, 40
    for site in sites:
        site.t["gate"] += 0.04 * torch.randn(K, 4, generator=site.random, dtype=torch.float64)
        for kind in "mv":
            for n, v in site.t.items():
                site.state[f"{kind}.{n}"] = torch.randn(
                    v.shape, generator=site.random, dtype=v.dtype
                )
    for step in range(8):
        for site in sites:
            site.shake(0.01)
        old = [{n: v.clone() for n, v in (site.t | site.state).items()} for site in sites]
        if step == 3:
            past = old
        schedule.after_step(sites, step, n_steps)
    share = 1 - 0.3 * (1 + math.cos(math.pi * 8 / (40 * 2 / 3))) / 2
    n_changed = 0
    for k in range(K):
        for site, now in zip(sites, old, strict=True):
            site.t["gate"], site.was = now["gate"].clone(), site.t["gate"].clone()
        pruned, s = naive_beam(sites, 0.05, share, k)
        for j, site in enumerate(sites):
            own = [i for jj, i in pruned if jj == j]
            own = [i for i in own if i in s[j].argsort()[:2]]
            best = s[j].argsort(descending=True)[: len(own)].tolist()
            parents = []
            for i in range(4):
                if i in own:
                    mine = site.t["A"][k, i]
                    (parent,) = [p for p in best if torch.equal(mine, past[j]["A"][k, p])]
                    parents.append(parent)
                    for n in ("m.A", "v.A"):
                        assert torch.equal(site.state[n][k, i], past[j][n][k, parent])
                    for n in ("m.B", "v.B"):
                        assert torch.equal(site.state[n][k, :, i], past[j][n][k, :, parent])
                    assert torch.equal(site.t["B"][k, :, i], past[j]["B"][k, :, parent])
                    mean = (old[j]["gate"][k, i] + old[j]["gate"][k, parent]) / 2
                    assert site.was[k, i] == site.was[k, parent] == mean
                    n_changed += 1
                else:
                    assert torch.equal(site.t["A"][k, i], old[j]["A"][k, i])
                    if i not in best:
                        assert site.was[k, i] == old[j]["gate"][k, i]
            assert sorted(parents) == sorted(best), "every parent has one child"
            assert not site.state["m.gate"].any()
        for site in sites:
            site.t["gate"] = site.was
    assert n_changed >= 3


def test_beamlora_prunes_nothing_once_p_is_1():
    recipe, sites = sites_of("beamlora")
    for seed in range(40):
        for j, site in enumerate(sites):
            noise = torch.Generator().manual_seed(10 * seed + j)
            site.t["gate"] = 0.05 * torch.randn(K, 4, generator=noise)  # fp32, whose sums round
            site.fixed["tau"] = site.fixed["tau"].float()
        assert not any(w.any() for w in recipe.schedule.weak(sites, 30, 40))


def test_beamlora_never_prunes_a_rank_that_becomes_a_parent():
    recipe, sites = sites_of("beamlora", p=0.3)
    for site in sites:
        site.t["gate"] = torch.tensor([[0.0, 0.0, 0.0, 0.1], [0.0] * 4], dtype=torch.float64)
    found = recipe.schedule.weak(sites, 7, 40)
    assert sum(int(weak.sum()) for weak in found) > 4
    for site, weak in zip(sites, found, strict=True):
        for k in range(K):  # equal ranks follow each other as they stand
            best = sorted(range(4), key=lambda i: -site.t["gate"][k, i].item())
            assert not weak[k, best[: int(weak[k].sum())]].any()


class HeldOut(Running):
    """A site whose held-out loss is a function of all sites' updates."""

    others: list

    def held_out_loss(self):
        total = 0
        for j, site in enumerate(self.others):
            target = torch.linspace(-1, 1, site.dense()[0].numel(), dtype=torch.float64)
            total = total + (site.dense().flatten(1) - (j + 1) * target).square().sum(-1)
        return total


def alora_sites(**settings):
    recipe = build("alora", **settings)
    sites = [HeldOut(recipe.form, j) for j in range(len(SIZES))]
    for site in sites:
        site.others = sites
        site.shake(0.5)
    return recipe.schedule, sites


def test_alora_scores_ranks_by_ablation():
    _, sites = alora_sites()
    before = [site.dense() for site in sites]
    IS = ablation(sites)
    for site, old in zip(sites, before, strict=True):
        assert torch.equal(site.dense(), old)
    whole = -sites[0].held_out_loss()
    kept = [site.t["B"].clone() for site in sites]
    for j, site in enumerate(sites):
        for r in range(4):
            site.t["B"][..., r] = 0
            without = -sites[0].held_out_loss()
            for other in sites:
                other.t["B"] = torch.zeros_like(other.t["B"])
            site.t["B"][..., r] = kept[j][..., r]
            alone = -sites[0].held_out_loss()
            for other, B in zip(sites, kept, strict=True):
                other.t["B"] = B.clone()
            torch.testing.assert_close(IS[j][:, r], whole - without + alone)


@pytest.mark.parametrize("n_moved", [1, 2, 3, 5])
def test_alora_moves_the_worst_ranks_to_modules_that_lost_none(n_moved):
    schedule, sites = alora_sites(n_moved=n_moved)
    IS = ablation(sites)
    before = [{n: v.clone() for n, v in site.t.items()} for site in sites]
    schedule.after_step(sites, 12, 40)
    for k in range(K):
        every = sorted((float(IS[j][k, r]), j, r) for j in range(3) for r in range(4))
        lost = [(j, r) for _, j, r in every[:n_moved]]
        spared = [j for j in range(3) if j not in {j for j, _ in lost}]
        spared.sort(key=lambda j: -sum(IS[j][k].tolist()))
        turns = [spared[i % len(spared)] for i in range(n_moved)] if spared else []
        counts = [int(schedule.ranks([site])[0][k]) for site in sites]
        for j, site in enumerate(sites):
            left = [r for r in range(4) if (j, r) not in lost]
            assert counts[j] == len(left) + turns.count(j)
            old = before[j]["B"][k][:, left] @ before[j]["A"][k][left]
            torch.testing.assert_close(site.dense()[k], old)
            new = site.t["A"][k, len(left) : counts[j]]
            assert new.any(-1).all() and (new.abs() <= site.site.d_in**-0.5).all()
            assert not site.t["B"][k, :, len(left) :].any()


def block(*layers):
    """Return sites of these layers, each of size 8 by 12."""
    return [SimpleNamespace(site=Site(str(i), 8, 12, 4, layer=n)) for i, n in enumerate(layers)]


def test_alora_shares_new_ranks_evenly_by_mean_importance():
    """The paper's footnote 3: 8 ranks over 3 modules are 3, 3 and 2."""
    own = torch.arange(16.0)
    scores = [torch.arange(-16.0, 0), own[:4] + 3, own[:4] + 1, own[:4] + 2]
    pruned, grown = build("alora", n_moved=8).schedule.choose(block(0, 0, 0, 0), scores)
    assert pruned == [(0, r) for r in range(8)]
    assert [grown.count(i) for i in range(4)] == [0, 3, 2, 3]
    full = [torch.arange(-16.0, 0), own[:8], own[:7], own[:7]]  # 8 is the most that fit
    pruned, grown = build("alora", n_moved=8).schedule.choose(block(0, 0, 0, 0), full)
    assert len(pruned) == 8 and grown == [2, 3]


def test_alora_adds_nothing_when_every_module_has_lost_a_rank():
    """Line 6 of algorithm 1, and footnote 4: the total falls."""
    scores = [torch.tensor([float(i), 10.0, 10.0, 10.0]) for i in range(3)]
    pruned, grown = build("alora", n_moved=3).schedule.choose(block(0, 0, 0), scores)
    assert pruned == [(0, 0), (1, 0), (2, 0)] and grown == []
    bad = [torch.full((4,), torch.nan)] * 3  # a diverged trial
    assert build("alora").schedule.choose(block(0, 0, 0), bad) == ([], [])


def test_alora_moves_as_many_ranks_as_a_block_has_modules():
    scores = [torch.arange(4.0) + i for i in range(6)]
    for layers, n in (((0, 0, 0, 1, 1, 1), 3), ((0, 0, 1, 1, 2, 2), 2), ((0,) * 6, 6)):
        assert len(build("alora").schedule.choose(block(*layers), scores)[0]) == n


def test_aloras_rounds_are_a_quarter_of_an_epoch_apart_in_three():
    """One epoch of three before the first, K2 = 0.25 epochs after each, 8 rounds (section 4.3)."""
    schedule = build("alora").schedule
    assert [t for t in range(1, 121) if schedule.is_round(t - 1, 120)] == list(range(40, 111, 10))


METHODS = ["adalora", "increlora", "elalora", "alora"]


@pytest.mark.parametrize("name", METHODS)
def test_slots_with_different_ranks_do_not_see_each_other(name):
    """Packed equals alone to fp64, but for the zeros that pad the smaller slot."""
    settings = {"rounds": 3} if name == "alora" else {}  # each costs two losses per rank
    more = {"settings": settings}
    trials = [toy_trial(name, lr=1e-2, seed=0, **more), toy_trial(name, lr=3e-3, seed=1, **more)]
    packed = train(trials, torch.float64)
    for i, trial in enumerate(trials):
        alone = slot_tensors(train([trial], torch.float64), 0)
        for tensor, value in slot_tensors(packed, i).items():
            own = value[tuple(slice(n) for n in alone[tensor].shape)]
            torch.testing.assert_close(own, alone[tensor], rtol=1e-9, atol=1e-12)
            assert value.norm().item() == pytest.approx(own.norm().item(), rel=1e-12)


def test_ranks_that_leave_free_memory_and_compute():
    n_numbers = []
    for xi in (0.0, 0.03):
        trained = train([toy_trial("sora", steps=30, settings={"xi": xi})])
        n_numbers.append(sum(p.numel() for p in trained.pack.parameters()))
        widths = [bank.tensors()["A"].shape[-2] for _, bank in trained.pack.banks()]
        assert (widths == [4, 4, 4]) == (xi == 0)
    assert n_numbers[1] < 0.9 * n_numbers[0]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("adalora", {}),
        ("increlora", {}),
        ("elalora", {}),
        ("alora", {"rounds": 3, "n_moved": 2}),
        ("salora", {}),
        ("sora", {"xi": 0.03}),
        ("dylora", {"keep": 2}),
    ],
)
def test_tensors_and_moments_hold_the_ranks_in_use_and_no_others(name, settings):
    """What a rank costs goes when it goes: parameters, gradients and the optimizer's memory."""
    trial = toy_trial(name, steps=30, lr=1e-2, settings=settings)
    run = _Run(ToyModel(), ToyTask(), [trial], None)
    while run.step < run.n_steps:
        run.advance()
    (outcome,), axes = run.outcomes, rank_axes(build(name).form)
    in_use = outcome.ranks[-1][1]
    assert len(set(in_use.values())) > 1 or set(in_use.values()) != {RANK}, "no rank has moved"
    for group in run.optimizer.groups:
        for state in group.states:
            n = in_use[state.site.name]
            sizes = {state.t[t].shape[axis] for t, axis in axes.items()}
            sizes |= {state.state[f"{m}.{t}"].shape[a] for t, a in axes.items() for m in "mv"}
            assert sizes == {max(n, 1)}, f"{state.site.name} holds {sizes} for {n} ranks"


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("adalora", {"first": 0}, "first of AdaSVD must be a whole number from 1 on, not 0"),
        ("increlora", {"add": 0}, "add of IncreLoRA must be a whole number from 1 on, not 0"),
        ("increlora", {"share": 1.5}, "share of IncreLoRA must be a share, .*, not 1.5"),
        ("elalora", {"b": 0}, "b of ElaLoRA must be a whole number from 1 on, not 0"),
        ("elalora", {"t_final": 0.95}, "of ElaLoRA are .* leave room between them, not .* 0.95"),
        ("sora", {"xi": -1.0}, "xi of ProximalAdamW must be at least 0, not -1.0"),
        ("sora", {"interval": 0.0}, "interval of DropZeroGates must be a share, .*, not 0.0"),
        ("salora", {"growth": 0.5}, "growth of SaLoRA must be at least 1, not 0.5"),
        ("salora", {"interval": 2.0}, "interval of L0Budget must be a share, .*, not 2.0"),
        ("dylora", {"p": 1.0}, "p of DyLoRA must be a share, .*, not 1.0"),
        ("dylora", {"keep": 0}, "keep of Truncate must be a whole number from 1 on, not 0"),
        ("beamlora", {"tau": 0.0}, "tau of BeamLoRA must be positive, not 0.0"),
        ("beamlora", {"until": 0.0}, "until of Beam must be a share, .*, not 0.0"),
        ("alora", {"n_moved": 0}, "n_moved of ALoRA must be a whole number from 1 on, not 0"),
        ("alora", {"t_final": 0.9}, "of ALoRA are .* leave room between them, not .* 0.9"),
    ],
)
def test_mistakes_are_named(method, settings, words):
    with pytest.raises(UserError, match=words):
        build(method, **settings)
