from types import SimpleNamespace

import pytest
import torch
from torch import nn

from loralab.errors import UserError
from loralab.models.tiny import RECIPES, TinyRecipe, lines, pretrain, untrained
from loralab.seeds import generator
from loralab.study.trial import Trial
from loralab.tasks.synthetic import SPECS, SyntheticSpec, SyntheticTask
from loralab.training.generate import greedy
from loralab.training.loop import train_pack

SMALL = SyntheticSpec(length=4, n_train=40, n_validation=20, n_test=20)
SPLITS = ("train", "validation", "test")


def rows(task, split):
    ids = task.batch(split, range(task.size(split)))["input_ids"]
    return [task.tokenizer.decode(row) for row in ids]


def test_splits_are_disjoint_and_fixed_by_the_seed():
    task = SyntheticTask(spec=SMALL)
    parts = [rows(task, split) for split in SPLITS]
    assert [len(part) for part in parts] == [40, 20, 20]
    assert len({line for part in parts for line in part}) == 80
    assert parts == [rows(SyntheticTask(spec=SMALL), split) for split in SPLITS]
    other = SyntheticTask(spec=SyntheticSpec(**{**vars(SMALL), "seed": 1}))
    assert parts != [rows(other, split) for split in SPLITS]


def test_answers_follow_the_compositions():
    def reverse(s):
        return s[::-1]

    def shift(s):
        return [chr((ord(c) - 96) % 8 + 97) for c in s]

    def swap(s):
        return [s[1], s[0], s[3], s[2]]

    meaning = {
        "#1": lambda s: shift(reverse(s)),
        "#2": lambda s: reverse(sorted(s)),
        "#3": lambda s: reverse(swap(s)),
    }
    tags = set()
    for line in rows(SyntheticTask(spec=SMALL), "train"):
        tag, *words = line.split()
        tags.add(tag)
        assert words[4] == "=" and words[9] == "end"
        assert words[5:9] == meaning[tag](words[:4])
    assert tags == meaning.keys()


def test_losses_count_answer_tokens_only():
    task = SyntheticTask(spec=SMALL)
    model = untrained(TinyRecipe(width=16, layers=1, heads=2, mlp_width=32))
    batch = task.batch("train", [3, 1, 7])
    total, count = task.losses(model, batch)
    assert count.tolist() == [5, 5, 5]
    for row, value in zip(batch["input_ids"], total, strict=True):
        logs = model(input_ids=row[None]).logits[0].log_softmax(-1)
        expected = -sum(logs[i - 1, row[i]] for i in range(6, 11))
        torch.testing.assert_close(value, expected)


class Oracle(nn.Module):
    """Answers every prompt of `lines` rightly but for the row and answer position of `wrong`."""

    def __init__(self, ids, prompt_length, wrong):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.ids, self.prompt_length, self.wrong = ids, prompt_length, wrong

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        at = past_key_values or self.prompt_length
        best = self.ids[:, at].clone()
        if at - self.prompt_length == self.wrong[1]:
            best[self.wrong[0]] += 1
        logits = nn.functional.one_hot(best, 64).float().unsqueeze(1)
        return SimpleNamespace(logits=logits, past_key_values=at + 1)


@pytest.mark.parametrize("split", ["n_train", "n_validation", "n_test"])
def test_a_split_without_items_is_refused(split):
    with pytest.raises(UserError, match=f"{split} of the synthetic task counts its items"):
        SyntheticSpec(**{split: 0})


@pytest.mark.parametrize("position", [0, 4])
def test_scores_ask_for_every_token_and_are_slot_major(position):
    task = SyntheticTask(spec=SMALL)
    ids = task.batch("test", [2, 0, 5])["input_ids"].repeat(2, 1)
    if position == 4:  # not ending is wrong too: the end token is part of the answer
        assert ids[4, -1] == task.tokenizer.eos_token_id
    oracle = Oracle(ids, task.prompt_length, (4, position))
    scores = task.scores(oracle, "test", [2, 0, 5], copies=2)
    assert scores.tolist() == [[1, 1, 1], [1, 0, 1]]


def test_a_base_that_ends_at_once_scores_zero():
    task = SyntheticTask(spec=SMALL)
    ids = torch.full((2, 11), task.tokenizer.eos_token_id)
    oracle = Oracle(ids, task.prompt_length, (0, 99))
    assert task.scores(oracle, "test", [0, 1], copies=1).tolist() == [[0, 0]]


@pytest.fixture(scope="module")
def quick_base():
    return pretrain(RECIPES["tiny-quick"]).eval()


def test_the_quick_base_knows_its_operations_but_not_the_task(quick_base):
    with torch.no_grad():
        for name in RECIPES["tiny-quick"].operations:
            ids = lines((name,), 200, 4, generator("test", name))
            right = quick_base(input_ids=ids).logits[:, 5:-1].argmax(-1) == ids[:, 6:]
            assert right.all(-1).float().mean() > 0.8, name
    task = SyntheticTask(spec=SPECS["synthetic-quick"])
    everything = range(task.size("validation"))
    assert task.scores(quick_base, "validation", everything, copies=1).mean() < 0.1


def trial(method, lr, steps):
    return Trial("tiny-quick", "synthetic-quick", method, lr, steps=steps)


def test_the_learning_rate_curve_has_its_real_shape(quick_base):
    task = SyntheticTask(spec=SPECS["synthetic-quick"])
    trained = train_pack(quick_base, task, [trial("lora", lr, 100) for lr in (3e-4, 1e-2, 0.3)])
    try:
        low, tuned, high = trained.evaluate("validation").mean(-1).nan_to_num(0).tolist()
    finally:
        trained.close()
    assert low < 0.1 and tuned > 0.7 and high < 0.1


def test_packed_decoding_equals_each_adapter_alone(quick_base):
    task = SyntheticTask(spec=SPECS["synthetic-quick"])
    prompts = task.batch("test", range(20))["input_ids"][:, : task.prompt_length]
    settings = {"max_new_tokens": 5, "eos_token_ids": [1], "pad_token_id": 0}
    trials = [trial("lora", 3e-2, 20), trial("pissa", 1e-2, 20), trial("dora", 2e-2, 20)]

    def decode(some):
        trained = train_pack(quick_base, task, some)
        try:
            with trained.pack.rows([20] * len(some)):
                slots = sorted(range(len(some)), key=lambda i: trained.slots[i])
                rows = greedy(quick_base, prompts.repeat(len(some), 1), **settings)
        finally:
            trained.close()
        return {some[i].method: part for i, part in zip(slots, rows.split(20), strict=True)}

    together = decode(trials)
    for one in trials:
        assert torch.equal(together[one.method], decode([one])[one.method]), one.method
    answers = [part.tolist() for part in together.values()]
    assert answers[0] != answers[1] != answers[2] != answers[0]


def test_mistakes_are_named():
    with pytest.raises(UserError, match="raise `length`"):
        SyntheticSpec(length=2)
    with pytest.raises(UserError, match="compositions"):
        SyntheticSpec(compositions=())
    with pytest.raises(UserError, match="did you mean sort"):
        SyntheticTask(spec=SyntheticSpec(compositions=(("sortt",),)))
    with pytest.raises(UserError, match="train, validation, test"):
        SyntheticTask(spec=SMALL).size("dev")
