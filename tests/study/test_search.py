import dataclasses

from loralab.study.packing import halves, pack_trials
from loralab.study.parse import parse
from loralab.study.results import MethodChoice, TrialResult
from loralab.study.search import best_point, confirm_trials, families, grid_round, grid_trials

SPEC = parse(
    {
        "task": "t",
        "steps": 4,
        "methods": ["lora", "pissa"],
        "lr": {"start": 1e-4, "stop": 1e-2, "per_decade": 2},
        "ranks": [4, 8],
        "batch_sizes": [2, 3],
        "seeds": 2,
    },
    "s.toml",
)


def results(planned, score):
    """Return finished trials; a score of None means diverged."""
    found = []
    for p in planned:
        value = score(p.trial)
        status = "diverged" if value is None else "done"
        found.append(TrialResult(p.trial, p.label, p.stage, status, validation=value))
    return found


def search(score, spec=SPEC, higher=True):
    """Play the grid stage to its end; return (rounds that trained, last round, results)."""
    done, n_rounds = [], 0
    while (found := grid_round(spec, 10, done, higher)).pending:
        done += results(found.pending, score)
        n_rounds += 1
    return n_rounds, found, done


def test_the_grid_covers_every_family_once_per_seed():
    planned = grid_trials(SPEC, 10, families(SPEC))
    assert len(planned) == 2 * 2 * 2 * 5 * 2 == len({p.trial.id for p in planned})
    assert {p.trial.seed for p in planned} == {0, 1}


def test_an_optimum_inside_needs_one_round():
    n_rounds, found, _ = search(lambda t: -abs(t.lr - 1e-3))
    assert n_rounds == 1 and {c.best_lr for c in found.choices} == {1e-3}
    assert not any(c.at_edge or c.widened or c.lower_bound for c in found.choices)


def test_a_lower_score_wins_when_lower_is_better():
    _, found, _ = search(lambda t: abs(t.lr - 3.16e-3), higher=False)
    assert {c.best_lr for c in found.choices} == {3.16e-3}


def test_widening_finds_an_optimum_just_outside():
    n_rounds, found, done = search(lambda t: -abs(t.lr - 3.16e-2))
    assert n_rounds == 2 and {c.widened for c in found.choices} == {1}
    assert {c.best_lr for c in found.choices} == {3.16e-2}
    assert not any(c.lower_bound for c in found.choices)
    assert {t.trial.lr for t in done} == {1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1}


def test_widening_ends_after_two_rounds_with_a_lower_bound():
    n_rounds, found, _ = search(lambda t: -t.lr if t.method == "pissa" else -abs(t.lr - 1e-3))
    assert n_rounds == 3
    for c in found.choices:
        assert c.lower_bound == (c.label == "pissa")
        assert c.best_lr == (1e-6 if c.label == "pissa" else 1e-3)
        assert (c.widened, c.at_edge) == ((2, "low") if c.label == "pissa" else (0, ""))


def test_without_widening_an_edge_is_a_lower_bound_at_once():
    spec = dataclasses.replace(SPEC, widen=False)
    n_rounds, found, _ = search(lambda t: t.lr, spec)
    assert n_rounds == 1 and all(c.lower_bound and c.at_edge == "high" for c in found.choices)


def test_diverged_points_count_as_tested_and_cannot_win():
    def score(t):
        return None if t.lr > 2e-3 and t.seed == 1 else t.lr

    n_rounds, found, _ = search(score)
    assert n_rounds == 1 and {c.best_lr for c in found.choices} == {1e-3}
    assert not any(c.at_edge for c in found.choices)


def test_a_family_that_always_diverges_has_no_winner():
    n_rounds, found, _ = search(lambda t: None if t.method == "pissa" else -abs(t.lr - 1e-3))
    assert n_rounds == 3
    assert {c.label for c in found.choices if c.best_lr is None and c.lower_bound} == {"pissa"}
    assert {p.label for p in confirm_trials(SPEC, 10, found.choices)} == {"lora"}


def test_ties_take_the_middle():
    assert best_point({1.0: 5.0, 2.0: 5.0, 3.0: 5.0, 4.0: 1.0}, True) == 2.0
    assert best_point({1.0: 5.0, 2.0: 5.0}, True) == 1.0


def test_a_metric_that_is_flat_leaves_the_choice_to_the_training_loss():
    flat = {1.0: 0.0, 2.0: 0.0, 3.0: 0.0}
    assert best_point(flat, True, {1.0: 3.0, 2.0: 2.0, 3.0: 1.0}) == 3.0
    assert best_point(flat | {1.0: -1.0}, True, {1.0: 0.0, 2.0: 2.0, 3.0: 1.0}) == 2.0


def test_packs_cover_all_and_share_what_they_can():
    planned = grid_trials(SPEC, 10, families(SPEC))
    packs = pack_trials(planned, 12)
    assert sorted(p.trial.id for pack in packs for p in pack) == sorted(p.trial.id for p in planned)
    assert {len(pack) for pack in packs} == {10}  # 12 would cut families in two
    for pack in pack_trials(planned, 5):
        assert len({(p.label, p.trial.rank, p.trial.seed, p.trial.batch_size) for p in pack}) == 1


def test_packs_keep_every_worker_busy_and_the_same_arguments_give_the_same_packs():
    planned = grid_trials(SPEC, 10, families(SPEC))
    for workers in (2, 3, 16, 70):
        packs = pack_trials(planned, 100, workers)
        assert len(packs) >= workers and max(map(len, packs)) <= -(-80 // workers)
        assert packs == pack_trials(planned[::-1][::-1], 100, workers)
    assert len(pack_trials(planned[:3], 100, 8)) == 3


def test_packs_are_cut_where_another_kind_of_bank_begins():
    names = ["pissa", "dora", "lora", "olora"]  # pissa and olora share their banks
    spec = dataclasses.replace(
        SPEC, methods=parse({"task": "t", "steps": 1, "methods": names}, "s").methods
    )
    planned = confirm_trials(spec, 10, [MethodChoice(name, 8, 2, 1e-3) for name in names])
    packs = [{p.label for p in pack} for pack in pack_trials(planned, 9)]
    assert len(packs) == 2 and any({"pissa", "olora"} <= labels for labels in packs)


def test_packs_never_mix_lengths():
    spec = dataclasses.replace(SPEC, steps=None, epochs=2.0)
    packs = pack_trials(grid_trials(spec, 10, families(spec)), lambda group: 100)
    assert [len({p.trial.steps for p in pack}) for pack in packs] == [1, 1]
    assert {pack[0].trial.steps for pack in packs} == {10, 7}


def test_halves_keep_the_order():
    assert halves(["a", "b", "c"]) == [["a", "b"], ["c"]]
