"""Merge-and-restart methods and their kin against plain loops over dense matrices."""

import itertools
import math

import pytest
import torch
from torch import nn

from loralab import adapt
from loralab.errors import UserError
from loralab.methods import build
from loralab.recipe import Evidence, Site
from loralab.training.optimizer import PackOptimizer

M, N, R, LR = 6, 8, 2, 0.05


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Blocks(nn.Module):
    """Linear layers side by side, each in a block of its own; the output is their sum."""

    def __init__(self, n=1):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"layer": nn.Linear(N, M, bias=False, dtype=torch.float64)})
            for _ in range(n)
        )
        with torch.no_grad():
            for i, block in enumerate(self.blocks):
                block["layer"].weight.copy_(draw(i, M, N))

    def forward(self, x):
        return sum(block["layer"](x) for block in self.blocks)


X, Y = draw(50, 5, N), draw(51, 5, M)


def gradient(W):
    """Return dL/dW of L = |X W' - Y|² / 2."""
    return (X @ W.mT - Y).mT @ X


class Run:
    """A method on `Blocks`, step by step."""

    def __init__(self, method, n_steps, n_blocks=1, **settings):
        self.model = Blocks(n_blocks)
        self.adapter = adapt(self.model, method, rank=R, targets="all-linear", **settings)
        self.optimizer = PackOptimizer(self.adapter.pack, n_steps)
        (group,) = self.optimizer.groups
        self.sites, self.schedule, self.step_number = group.states, group.schedule, 0

    @property
    def bank(self):
        return next(self.adapter.pack.banks())[1]

    def delta(self):
        return self.bank.delta()[0].detach().clone()

    def tensor(self, name):
        return getattr(self.bank, name)[0].detach().clone()

    def step(self):
        self.optimizer.zero_grad()
        ((self.model(X) - Y).square().sum() / 2).backward()
        self.optimizer.collect()
        self.optimizer.step(torch.tensor([LR]), torch.tensor([0.0]), self.step_number)
        self.step_number += 1

    def act(self, hook, *numbers):
        """Call a hook of the Schedule as training does."""
        with torch.no_grad():
            getattr(self.schedule, hook)(self.sites, *numbers)

    def put(self, **tensors):
        with torch.no_grad():
            for name, value in tensors.items():
                getattr(self.bank, name).copy_(value)


def adam(memory, g):
    """Return AdamW's step for gradient g; `memory` is a dict, empty after a restart."""
    memory["t"] = t = memory.get("t", 0) + 1
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * g * g
    return LR * (memory["m"] / (1 - 0.9**t)) / ((memory["v"] / (1 - 0.999**t)).sqrt() + 1e-8)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("cola", {}), ("rac_lora", {"n_links": 3}), ("rac_lora", {"n_links": 3, "train": "A"})],
)
def test_chains_sum_their_links(method, settings):
    run, s, merged = Run(method, 6, alpha=3.0, **settings), 3.0 / R, torch.zeros(M, N).double()
    W, random = draw(0, M, N), []
    trained = {"cola": "AB"}.get(method, settings.get("train", "B"))
    for link in range(3):
        A, B, memory = run.tensor("A"), run.tensor("B"), {"A": {}, "B": {}}
        random.append(B if trained == "A" else A)
        assert (B @ A).abs().max() == 0
        for _ in range(2):
            G = gradient(W + merged + s * B @ A)
            steps = {"A": adam(memory["A"], s * B.mT @ G), "B": adam(memory["B"], s * G @ A.mT)}
            A = A - steps["A"] * ("A" in trained)
            B = B - steps["B"] * ("B" in trained)
            run.step()
        torch.testing.assert_close(run.delta(), merged + s * B @ A)
        if link < 2:  # the last link is not folded: nothing follows
            merged = merged + s * B @ A
    for first, second in itertools.combinations(random, 2):
        assert not torch.equal(first, second)
    assert torch.linalg.matrix_rank(run.delta()) == 3 * R


def test_rac_lora_takes_a_projected_gradient_step():
    """Eq. 3: with orthonormal rows in A, a gradient step of B moves W by -γ ∇f(W) AᵀA."""
    site, form = Site("layer", N, M, R), build("rac_lora").form
    t = form.init(site, Evidence(draw(0, M, N), 1.0, 0, "layer"))
    t["A"] = torch.linalg.qr(t["A"].mT).Q.mT
    B = t["B"].requires_grad_()
    W = draw(0, M, N)
    ((X @ (W + form.delta(t, site)).mT - Y).square().sum() / 2).backward()
    H = t["A"].mT @ torch.linalg.inv(t["A"] @ t["A"].mT) @ t["A"]
    torch.testing.assert_close(-0.1 * B.grad @ t["A"], -0.1 * gradient(W) @ H)


@pytest.mark.parametrize("train", ["A", "B"])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_rac_loras_normal_draw_has_unit_variance_whatever_the_rank(rank, train):
    form = build("rac_lora", train=train, distribution="normal").form
    t = form.init(Site("s", 4000, 4000, rank), Evidence(torch.zeros(1).double(), 1.0, 0, "s"))
    random = t["B" if train == "A" else "A"]
    assert not t[train].any()
    assert random.std().item() == pytest.approx(1.0, abs=0.05)
    assert random.mean().item() == pytest.approx(0.0, abs=0.05)
    assert random.pow(4).mean().item() == pytest.approx(3.0, abs=0.5)  # uniform draws have 1.8


def test_periodic_lora_unloads_a_share_and_keeps_the_function():
    run = Run("periodic_lora", 4, alpha=3.0, every=2, momentum=0.1)
    run.step()
    before = run.tensor("A"), run.tensor("B")
    memory = [run.sites[0].state[n].clone() for n in ("m.B", "v.B")]
    assert all(m.any() for m in memory)
    total = run.delta()
    run.act("after_step", 1, 4)
    root = math.sqrt(0.9)
    torch.testing.assert_close(run.tensor("A"), root * before[0])
    torch.testing.assert_close(run.tensor("B"), root * before[1])
    torch.testing.assert_close(run.delta(), total)
    left = 1.5 * run.tensor("B") @ run.tensor("A")
    torch.testing.assert_close(run.delta() - left, 0.1 * 1.5 * before[1] @ before[0])
    assert not any(m.any() for m in run.sites[0].state.values())


def test_periodic_lora_variants():
    """LoRAFactory's lopsided shares change the function; momentum 1 is a full restart."""
    for settings in ({"lopsided": True}, {"momentum": 1.0}):
        run = Run("periodic_lora", 4, every=2, **settings)
        run.step()
        total, A, B = run.delta(), run.tensor("A"), run.tensor("B")
        run.act("after_step", 1, 4)
        if "lopsided" in settings:
            torch.testing.assert_close(run.tensor("A"), 0.9 * A)
            torch.testing.assert_close(run.delta(), 0.1 * B @ A + 0.81 * B @ A)
        else:
            torch.testing.assert_close(run.delta(), total)
            assert not run.tensor("B").any() and not torch.equal(run.tensor("A"), A)


def test_xgblora_moves_rank_one_on_few_layers_and_keeps_what_others_did():
    run = Run("xgblora", 6, n_blocks=5, every=2, n_layers=2, seed=1)
    banks = [bank for _, bank in run.adapter.pack.banks()]
    assert [bank.site.rank for bank in banks] == [1] * 5
    drawn = []
    for _ in range(3):
        before = [bank.delta()[0].detach().clone() for bank in banks]
        run.step()
        after = [bank.delta()[0].detach() for bank in banks]
        moved = {i for i in range(5) if not torch.equal(before[i], after[i])}
        assert len(moved) == 2
        assert all(torch.linalg.matrix_rank(after[i] - before[i]) == 1 for i in moved)
        drawn.append(moved)
        run.step()
    assert len(set(map(frozenset, drawn))) > 1
    worked = [sum(i in moved for moved in drawn) for i in range(5)]
    ranks = [int(torch.linalg.matrix_rank(bank.delta()[0].detach())) for bank in banks]
    assert ranks == worked


def test_xgbloras_boosters_keep_the_scale_of_the_rank_asked_for():
    for settings, rank in (({}, 1), ({"booster_rank": None}, R)):
        run = Run("xgblora", 4, alpha=3.0, every=2, n_layers=1, **settings)
        for _ in range(3):  # past the first fold, which starts a booster anew
            assert run.bank.site.rank == rank and run.bank.scale.tolist() == [3.0 / R]
            run.step()


def test_delta_lora_moves_the_weight_by_each_change_after_k():
    """The algorithm's own loop over a moving dense W, for a given walk of A and B."""
    run, s, lam, K = Run("delta_lora", 100, alpha=3.0, start_steps=2), 1.5, 2.0, 2
    W = torch.zeros(M, N).double()
    A, B = draw(1, R, N), draw(2, M, R)
    for t in range(6):
        new_A, new_B = A + draw(10 + t, R, N), B + draw(20 + t, M, R)
        if t > K:
            W = W + lam * s * (new_B @ new_A - B @ A)
        A, B = new_A, new_B
        run.put(A=A, B=B)
        run.act("after_step", t, 100)
        torch.testing.assert_close(run.delta(), W + s * B @ A)
        run.optimizer.zero_grad()
        ((run.model(X) - Y).square().sum() / 2).backward()
        G = gradient(draw(0, M, N) + W + s * B @ A)
        torch.testing.assert_close(run.bank.B.grad[0], s * G @ A.mT)
        torch.testing.assert_close(run.bank.A.grad[0], s * B.mT @ G)
    assert torch.linalg.matrix_rank(W) <= 2 * R


def test_delta_lora_starts_in_short_runs_too():
    run = Run("delta_lora", 20)
    assert run.schedule.start_steps is None
    for step, moving in ((1, 0.0), (2, 1.0)):
        run.act("after_step", step, 20)
        assert run.tensor("moving").item() == moving


@pytest.mark.parametrize("n_mini", [1, 2])
def test_melora_is_an_ensemble_of_mini_pairs(n_mini):
    run = Run("melora", 1, alpha=3.0, n_mini=n_mini)
    run.put(A=draw(3, n_mini, R, N // n_mini), B=draw(4, n_mini, M // n_mini, R))
    A, B, D = run.tensor("A"), run.tensor("B"), torch.zeros(M, N).double()
    m, n = M // n_mini, N // n_mini
    for i in range(n_mini):
        for o in range(m):
            for j in range(n):
                D[i * m + o, i * n + j] = 1.5 * sum(B[i, o, p] * A[i, p, j] for p in range(R))
    torch.testing.assert_close(run.delta(), D)
    assert torch.linalg.matrix_rank(D) == n_mini * R
    assert run.adapter.pack.count_parameters() == [R * (M + N)]


def test_melora_needs_equal_parts():
    with pytest.raises(UserError, match=r"outputs \(6\) cannot be cut into 4 equal parts"):
        Run("melora", 1, n_mini=4)


@pytest.mark.parametrize("shape", [(6, 8, 2), (20, 7, 1), (5, 30, 2), (30, 4, 4)], ids=str)
@pytest.mark.parametrize("operator", ["share", "rotate"])
def test_mora_compresses_and_decompresses(operator, shape):
    m, n, r = shape
    site, form = Site("layer", n, m, r), build("mora", operator=operator).form
    side = math.floor(math.sqrt((m + n) * r))
    side -= side % 2 if operator == "rotate" else 0
    assert form.init(site, Evidence(draw(0, m, n), 1.0, 0, "layer"))["M"].shape == (side, side)
    W, x = draw(5, side, side), draw(6, n)
    filled = [x[i % n].item() for i in range(math.ceil(n / side) * side)]
    pieces = [torch.tensor(filled[i : i + side]).double() for i in range(0, len(filled), side)]
    if operator == "share":
        outputs = (W @ sum(pieces)).tolist()
    else:  # entries j and j + r̂/2 are a complex number
        outputs = []
        for i, piece in enumerate(pieces):
            z = torch.complex(piece[: side // 2], piece[side // 2 :])
            for j in range(side // 2):
                z[j] *= complex(math.cos(a := i * 10000 ** (-2 * j / side)), math.sin(a))
            outputs += (W @ torch.cat([z.real, z.imag])).tolist()
    wanted = torch.tensor([outputs[i % len(outputs)] for i in range(m)]).double()
    y = form.branch({"M": W[None]}, x[None, None], site)[0, 0]
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(form.delta({"M": W[None]}, site)[0] @ x, wanted)


def test_mora_rounds_down_unless_asked():
    site = Site("layer", 12, 8, 4)  # √80 = 8.94
    assert build("mora", operator="share").form.side(site) == 8
    assert build("mora", operator="share", nearest=True).form.side(site) == 9
    assert build("mora").form.scale(16.0, 4) == 1.0


def test_sd_lora_sums_normalised_directions():
    kept = {"magnitudes": "site", "restart_magnitudes": False}
    run = Run("sd_lora", 10, alpha=3.0, n_tasks=3, **kept)
    directions, magnitudes = [], []
    for task in range(3):
        A, B, alpha = draw(30 + task, R, N), draw(40 + task, M, R), 0.5 + task
        run.put(A=A, B=B, alpha=torch.tensor([alpha]))
        directions.append(B @ A / (B @ A).norm())
        magnitudes.append(alpha * (B @ A).norm())
        wanted = 1.5 * sum(a * D for a, D in zip(magnitudes, directions, strict=True))
        torch.testing.assert_close(run.delta(), wanted)
        if task < 2:
            run.act("next_task", task + 1)
            torch.testing.assert_close(run.delta(), wanted)
            assert not run.tensor("B").any() and run.tensor("alpha") == 1
            assert not torch.equal(run.tensor("A"), A)
    old = run.tensor("A_old"), run.tensor("B_old")
    run.step()
    assert torch.equal(run.tensor("A_old"), old[0]) and torch.equal(run.tensor("B_old"), old[1])
    moved = run.tensor("alpha_old") - torch.stack(magnitudes[:2])
    assert (moved != 0).all()


def test_sd_lora_refuses_more_tasks_than_it_was_made_for():
    run = Run("sd_lora", 10)
    with pytest.raises(UserError, match="n_tasks = 1 and cannot begin task 2"):
        run.act("next_task", 1)


def test_sd_lora_restarts_magnitudes():
    run = Run("sd_lora", 10, n_tasks=2)
    A, B = draw(1, R, N), draw(2, M, R)
    assert run.tensor("alpha") == 1
    run.put(A=A, B=B, alpha=torch.tensor([1.7]))
    run.act("next_task", 1)
    torch.testing.assert_close(run.delta(), B @ A / (B @ A).norm())
    run.put(B=B)
    torch.testing.assert_close(run.delta(), B @ A / (B @ A).norm() + B @ run.tensor("A"))


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, N)], ids=str)
def test_rst_lora_weights_the_input_token_by_token(shape):
    site, form = Site("layer", N, M, R), build("rst_lora").form
    A, B, x, gamma = draw(1, R, N), draw(2, M, R), draw(3, 5, N), draw(4, *shape).abs()
    t = {"A": A[None], "B": B[None], "token_weights": gamma[None]}
    y = form.branch(t, x[None], site)[0]
    for token in range(5):
        weighted = x[token] * (1 + gamma[token])
        torch.testing.assert_close(y[token], B @ (A @ weighted))
    del t["token_weights"]
    torch.testing.assert_close(form.branch(t, x[None], site)[0], x @ (B @ A).mT)


def test_rst_lora_takes_the_weights_with_the_batch():
    run = Run("rst_lora", 1)
    run.put(B=draw(2, M, R))
    D, base, x = run.tensor("B") @ run.tensor("A"), draw(0, M, N), draw(3, 4, 5, N)
    gamma = draw(4, 4, 5).abs()
    with run.adapter.given(token_weights=gamma):
        y = run.model(x)
    wanted = x @ base.mT + (x * (1 + gamma[..., None])) @ D.mT
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(run.model(x), x @ (base + D).mT)


@pytest.mark.parametrize("normalise", [True, False])
def test_flora_is_momentum_compressed_by_a_projection(normalise):
    """Algorithm 2 on the dense W itself, with the run's own projections."""
    run = Run("flora_compress", 9, every=3, normalise=normalise)
    W, A = draw(0, M, N), run.tensor("A")
    compressed = torch.zeros(M, R).double()
    for step in range(9):
        compressed = 0.9 * compressed + 0.1 * gradient(W) @ A.mT
        move = compressed @ A
        W = W - LR * (move / move.square().mean().sqrt() if normalise else move)
        run.step()
        torch.testing.assert_close(draw(0, M, N) + run.delta(), W)
        new = run.tensor("A")
        assert torch.equal(new, A) == (step not in (2, 5))
        if not torch.equal(new, A):
            compressed = compressed @ A @ new.mT
            A = new


def test_flora_draws_projections_of_unit_mean():
    """E[AᵀA] = I for A ~ N(0, 1/r)."""
    site, form = Site("layer", 4, 3, 20_000), build("flora_compress").form
    A = form.init(site, Evidence(draw(0, 3, 4), 1.0, 0, "layer"))["A"]
    torch.testing.assert_close(A.mT @ A, torch.eye(4).double(), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("method", "settings", "sentence"),
    [
        ("cola", {"every": 0}, "every of Chain must be a whole number from 1 on, not 0"),
        ("cola", {"n_links": 0}, "n_links of Chain must be a whole number from 1 on, not 0"),
        ("periodic_lora", {"momentum": 0.0}, "momentum of Unloading must be .*above 0 and at most"),
        ("xgblora", {"n_layers": 0}, "n_layers of Boosting must be a whole number from 1 on"),
        ("xgblora", {"booster_rank": 0}, "booster_rank of WeakBooster must be a whole number from"),
        ("rac_lora", {"train": "C"}, "train of Asymmetric cannot be 'C'; it is 'A' or 'B'"),
        (
            "rac_lora",
            {"distribution": "flat"},
            "distribution of Asymmetric cannot be 'flat'; it is 'uniform', 'normal' or",
        ),
        ("delta_lora", {"start_steps": -1}, "start_steps of StartMoving must be .* from 0 on"),
        ("delta_lora", {"ratio": -1.0}, "ratio of DeltaLoRA must be at least 0, not -1.0"),
        ("melora", {"n_mini": 0}, "n_mini of MELoRA must be a whole number from 1 on, not 0"),
        ("mora", {"operator": "fold"}, "operator of MoRA cannot be 'fold'; it is 'rotate' or 'sha"),
        ("sd_lora", {"n_tasks": 0}, "n_tasks of Directions must be a whole number from 1 on"),
        ("flora_compress", {"every": 0}, "every of Resampling must be a whole number from 1 on"),
        ("flora_compress", {"beta1": 1.0}, r"beta1 of Compressed must be in \[0, 1\)"),
        ("flora_compress", {"eps": 0.0}, "eps of Compressed must be positive"),
    ],
)
def test_settings_outside_their_range_are_refused(method, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        build(method, **settings)


@pytest.mark.parametrize("rule", ["lora_fa", "lora_plus"])
@pytest.mark.parametrize("schedule", ["cola", "periodic_lora", "xgblora"])
def test_folding_keeps_the_function_whoever_trains(rule, schedule):
    run = Run("lora", 6, rule=rule, schedule=schedule, every=2)
    run.step()
    before = run.delta()
    run.act("after_step", 1, 6)
    assert before.any()
    torch.testing.assert_close(run.delta(), before)
