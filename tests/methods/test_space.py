"""Pieces of different methods together: random recipes pass the exam, the others refuse."""

import inspect
import os

import pytest
import torch

import loralab
from loralab.core.change import fold
from loralab.errors import UserError
from loralab.methods import build, check
from loralab.recipe import Recipe, Schedule
from loralab.testing import CHECKS
from loralab.testing.space import called, obstacles, pieces, sample, spelled
from loralab.testing.toy import (
    ToyModel,
    ToyTask,
    slot_tensors,
    toy_adapter,
    toy_loss,
    toy_trial,
    train,
)
from loralab.training.optimizer import PackOptimizer

SEED = int(os.environ["LORALAB_SPACE_SEED"])
N_DRAWN = 4


def take_the_exam(recipe):
    # Where a Rule inverts, rounding of 1e-16 can grow by ten orders in a direction that hardly is.
    options = {"exact": 1e-5 if recipe.rule.inverts else 1e-9, "steps": 8}
    if recipe.schedule.resizes:  # choices of ranks magnify fp32's rounding; fp64 stays exact
        options["tolerance"] = 0.1
    for one in CHECKS:
        known = inspect.signature(one).parameters
        one(recipe, **{n: v for n, v in options.items() if n in known})


@pytest.mark.parametrize("at", range(N_DRAWN))
def test_random_recipes_pass_the_exam(at):
    recipe = sample(N_DRAWN, SEED)[at]
    print(f"{called(recipe)}; LORALAB_SPACE_SEED={SEED} repeats it")
    assert check(recipe) is recipe
    take_the_exam(recipe)


@pytest.mark.parametrize(
    "recipe",
    [
        build("dora", init="pissa", rule="lora_plus"),
        build("qpissa", init="corda", rule="lora_fa", schedule="periodic_lora"),
        build("lora", init="e2lora", rule="loft", schedule="alora"),
    ],
    ids=called,
)
def test_chosen_recipes_pass_the_exam(recipe):
    take_the_exam(recipe)


def test_a_seed_gives_the_same_recipes_and_words_give_them_back():
    drawn = sample(60, 7)
    assert drawn == sample(60, 7) and drawn != sample(60, 8)
    for recipe in drawn:
        method, swaps, settings = spelled(recipe)
        assert build(method, **swaps, **settings) == recipe
    own = build("loft", alternate=False, schedule="relora", **{"rule.beta1": 0.8})
    method, swaps, settings = spelled(own)
    assert settings == {"rule.alternate": False, "rule.beta1": 0.8}
    assert build(method, **swaps, **settings) == own


@pytest.mark.parametrize(
    ("name", "swaps", "words"),
    [
        ("full", {"init": "pissa"}, "start PiSSA needs a form made of one pair A, B, and Dense"),
        ("vera", {"rule": "lora+"}, "rule LoRAPlus treats tensor B apart, and form VeRA has none"),
        ("denselora", {"init": "nlora"}, "start Nystrom fills tensor A, B of one layer, and form"),
        ("rac_lora", {"rule": "loft"}, "rule LoFT moves tensor A, which form Asymmetric does not"),
        ("lora_fa", {"init": "init_b"}, "start InitB moves tensor A, which rule FrozenA does not"),
        ("alora", {"rule": "lora_fa"}, "schedule ALoRA moves tensor A, which rule FrozenA does"),
        ("beamlora", {"schedule": "sora"}, "schedule DropZeroGates changes ranks .* BeamLoRA have"),
        ("oft", {"init": "vb_lora", "anchored": True}, "is anchored, and form OFT adds no dW"),
        (
            "pissa",
            {"schedule": "alora"},
            "start PiSSA is anchored, and schedule ALoRA changes rank",
        ),
        (
            "sd_lora",
            {"init": "vb_lora", "anchored": True},
            "NextDirection changes tensor A_old, B_old, which would",
        ),
        (
            "bilora",
            {"schedule": "adalora"},
            "PseudoSVD does not go with schedule AdaBudget: .*soft",
        ),
        ("dylora", {"schedule": "alora"}, "form DyLoRA does not go with schedule ALoRA: .* nested"),
        ("autolora", {"schedule": "diffora"}, "SelectModules does not go with form WeightedParts"),
        ("diffora", {"schedule": "autolora"}, "SearchThenTrain does not go with form SelectedMod"),
    ],
)
def test_pieces_that_cannot_meet_refuse_with_both_names_and_the_reason(name, swaps, words):
    with pytest.raises(UserError, match=words) as caught:
        build(name, **swaps)
    assert "\n" not in str(caught.value) and "; choose another " in str(caught.value)


def test_every_refusal_names_its_two_pieces():
    assert len(obstacles()) > 1000
    for pair, refusal in obstacles().items():
        at = dict(pair)
        assert set(refusal.kinds) == set(at) and refusal.why
        assert all(name in refusal.sentence for name in at.values()), refusal.sentence
        assert refusal.sentence.endswith("; choose another {} or {}".format(*refusal.kinds))


def test_settings_widen_what_fits():
    build("init_ab", schedule="alora")
    build("bilora", schedule="adalora", values="real")
    with pytest.raises(UserError, match="InitAB is anchored"):
        build("init_ab", schedule="alora", anchored=True)


def test_a_recipe_made_by_hand_is_checked_too():
    space = pieces()
    recipe = Recipe(space["form"]["DyLoRA"], schedule=space["schedule"]["ALoRA"])
    with pytest.raises(UserError, match="form DyLoRA does not go with schedule ALoRA"):
        loralab.adapt(ToyModel(), recipe)
    assert build(recipe, schedule="dylora") == build("dylora")


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_a_part_of_an_anchored_update_can_be_folded(share):
    adapter = toy_adapter("pissa", ToyModel(torch.float64))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(p))
    for _, bank in adapter.pack.banks():
        before = bank.delta()
        fold(bank, share)
        torch.testing.assert_close(bank.past_B @ bank.past_A, share * before / bank.scale[0])
        if share < 1:  # with all of it folded the pair is renewed next
            torch.testing.assert_close(bank.delta(), before)


def test_chosen_ranks_keep_to_the_forms_divisor():
    for name in ("hra", "gralora"):
        pack = toy_adapter(build(name, init="ralora_pro"), ToyModel(), rank=4).pack
        ranks = [bank.site.rank for _, bank in pack.banks()]
        assert all(r % 2 == 0 and r for r in ranks) and len(set(ranks)) > 1


class OneMoves(Schedule):
    """Slot 0 swaps its ranks and drops one; the other slots keep theirs."""

    resizes = True

    def after_step(self, sites, step, n_steps):
        if step != 3:
            return
        for site in sites:
            index = torch.arange(site.site.rank).repeat(len(site.scale), 1)
            for slot, seed in enumerate(site.seeds):
                if seed == 0:
                    index[slot] = torch.tensor([2, 0, 1, -1])
            site.resize(index)


@pytest.mark.parametrize("rule", ["loft", "lora_rite", "altlora", "lora_pro", "rplora"])
def test_a_neighbours_new_ranks_leave_the_memory_of_a_rule_alone(rule, monkeypatch):
    """Slot 1 is as it is alone, and swapped ranks are the same ranks."""
    plain = [toy_trial("lora", 8, seed=k, lr=1e-3, swaps={"rule": rule}) for k in (0, 1)]
    lone = slot_tensors(train([plain[1]], torch.float64), 0)
    monkeypatch.setattr(
        "loralab.training.loop.slot_spec", _with_schedule(OneMoves(), loralab.training.loop)
    )
    packed = slot_tensors(train(plain, torch.float64), 1)
    for name, value in packed.items():
        torch.testing.assert_close(value, lone[name], rtol=1e-6, atol=1e-9)


def _with_schedule(schedule, loop):
    import dataclasses

    plain = loop.slot_spec

    def spec(trial):
        found = plain(trial)
        recipe = dataclasses.replace(found.recipe, schedule=schedule)
        return dataclasses.replace(found, recipe=recipe)

    return spec


@pytest.mark.parametrize(
    ("rule", "kept"), [("flora_compress", True), ("lora", False), ("altlora", True)]
)
def test_a_new_projection_keeps_only_a_momentum_that_can_follow_it(rule, kept):
    """Two steps, a new A after the second: no Rule's next step is out of all proportion."""
    recipe = build("lora", init="corda", rule=rule, schedule="flora_compress", every=2)
    pack = train([toy_trial(recipe, 6)], torch.float64).pack
    assert all(bank.past_B.shape[-1] > 4 for _, bank in pack.banks())
    pack = toy_adapter(recipe, ToyModel()).pack
    optimizer = PackOptimizer(pack, n_steps=6)
    for step in range(2):
        optimizer.zero_grad()
        toy_loss(pack.model, ToyTask().batch("train", range(8))).backward()
        optimizer.collect()
        optimizer.step(torch.tensor([1e-2]), torch.tensor([0.0]), step)
    assert optimizer.tensors()["0/0/m.B"].any() == kept
