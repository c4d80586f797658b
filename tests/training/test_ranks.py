"""What restarts add up to: ranks measured on the adapter, and their bound in the rank history."""

import pytest
import torch

from loralab.core.adapter import Adapter, adapt
from loralab.errors import UserError
from loralab.testing.toy import RANK, TARGETS, ToyModel, inputs, toy_trial, train
from loralab.testing.toy import trained_adapter as after_training

SMALLER = {"up": 8, "mid": 12, "down": 8}  # side of each toy layer


def dense_rank(adapter, layer, tolerance=None):
    """The rank of W' - W, both fp64, from the merged weights."""
    base = dict(ToyModel(torch.float64).named_parameters())[f"{layer}.weight"]
    now = adapter.merge().get_submodule(layer).weight
    adapter.unmerge()
    values = torch.linalg.svdvals((now - base).detach())
    return int((values > (tolerance or 1e-11) * values[0]).sum())


@pytest.mark.parametrize(
    ("method", "settings", "n_pairs"),
    [
        ("relora", {"every": 5}, 3),
        ("cola", {"n_links": 3}, 3),
        ("periodic_lora", {"every": 5, "momentum": 1.0}, 3),
        ("rac_lora", {"n_links": 3}, 3),
        ("rac_lora", {"n_links": 3, "train": "A"}, 3),
        ("xgblora", {"every": 3, "n_layers": 3}, 5),
        ("lora", {}, 1),
    ],
)
def test_the_rank_of_a_chain_is_that_of_all_its_pairs(method, settings, n_pairs):
    """Rank 2 (1 for XGBLoRA) a pair: the sum while it fits into the layer."""
    trained = train([toy_trial(method, 15, rank=2, lr=1e-2, settings=settings)], torch.float64)
    adapter = Adapter(trained.pack, method)
    wanted = {n: n_pairs if method == "xgblora" else 2 * n_pairs for n in TARGETS}
    assert adapter.ranks() == wanted
    assert {n: dense_rank(adapter, n) for n in TARGETS} == wanted
    history = trained.outcomes[0].ranks
    assert history == [] if method == "lora" else history[-1] == (15, wanted)
    merged = adapter.merge()(inputs(torch.float64))
    assert adapter.ranks() == wanted  # and it stays merged
    assert torch.equal(adapter.model(inputs(torch.float64)), merged)


def test_the_history_grows_by_a_pair_up_to_the_layers_size():
    (outcome,) = train([toy_trial("relora", 20, settings={"every": 5})]).outcomes
    assert [step for step, _ in outcome.ranks] == list(range(1, 21))
    for step, ranks in outcome.ranks:
        pairs = 4 if step == 20 else step // 5 + 1  # nothing is folded after the last step
        assert ranks == {n: min(RANK * pairs, side) for n, side in SMALLER.items()}


def test_layers_that_no_booster_chose_have_rank_0_in_every_slot_of_a_pack():
    trials = [
        toy_trial("xgblora", 4, seed=k, settings={"every": 2, "n_layers": 1}) for k in (0, 1, 2)
    ]
    packed = train(trials)
    for i, trial in enumerate(trials):
        alone = train([trial])
        assert packed.outcomes[i].ranks == alone.outcomes[0].ranks
        assert packed.outcomes[i].ranks[-1][1] == Adapter(alone.pack, "xgblora").ranks()


@pytest.mark.parametrize("method", ["eva", "gora"])
def test_ranks_that_the_start_chose_are_noted_from_the_first_step(method):
    trained = train([toy_trial(method, 2, settings={"rho": 2.0} if method == "eva" else {})])
    found = [ranks for _, ranks in trained.outcomes[0].ranks]
    own = {n: s.banks[0].site.rank for n, s in zip(trained.pack.names, trained.pack.sites)}  # noqa: B905
    assert found == [found[0]] * 2 and own == {n: r for n, r in found[0].items() if r}
    assert len(set(found[0].values())) > 1, "all ranks are alike: the test shows nothing"


def test_repeated_directions_count_once():
    """PeriodicLoRA's share unloaded keeps its direction: the bound is 8, the rank is less."""
    trials = [
        toy_trial("periodic_lora", 10, rank=2, settings={"every": 3, "momentum": 0.1}, lr=1e-9)
    ]
    trained = train(trials)
    assert trained.outcomes[0].ranks[-1][1]["mid"] == 8
    bank = trained.pack.sites[1].banks[0]
    with torch.no_grad():  # as if A had never moved and B only grown
        bank.A.copy_(bank.past_A[:, :2])
        bank.B.copy_(bank.past_B[:, :, :2])
        bank.past_A, bank.past_B = bank.past_A[:, :2], bank.past_B[:, :, :2] * 3
    assert Adapter(trained.pack, "periodic_lora").ranks()["mid"] == 2


@pytest.mark.parametrize("method", ["adalora", "loha", "hira", "dora", "oft", "pissa", "sd_lora"])
def test_other_forms_have_the_rank_of_their_dense_update(method):
    adapter = after_training(method, torch.float64)
    assert adapter.ranks(1e-8) == {n: dense_rank(adapter, n, 1e-8) for n in TARGETS}


def test_a_tolerance_leaves_small_directions_out():
    adapter = adapt(ToyModel(torch.float64), "lora", rank=3, targets="mid")
    bank = adapter.pack.sites[0].banks[0]
    with torch.no_grad():
        bank.A.copy_(torch.eye(12)[:3])
        bank.B.copy_(torch.eye(12)[:, :3] * torch.tensor([5.0, 0.5, 5e-7]))
    assert [adapter.ranks(t)["mid"] for t in (None, 1e-8, 1e-6, 0.05, 0.2)] == [3, 3, 2, 2, 1]
    bank.B.data.zero_()
    assert adapter.ranks() == {"mid": 0}


def test_an_update_that_depends_on_the_input_has_no_rank():
    with pytest.raises(UserError, match="lora_moe has no rank: its update depends on the input"):
        adapt(ToyModel(), "lora_moe", rank=2, targets=TARGETS).ranks()
