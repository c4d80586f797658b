"""Real weights and real data, where they are: see the README of the data folder."""

import json

import pytest
import torch

from loralab.models import load_model
from loralab.study.trial import Trial
from loralab.tasks import load_task
from loralab.training.loop import train_pack

N_TEXTS = 60


@pytest.fixture(scope="module")
def stories(data):
    model, tokenizer = load_model(str(data / "models" / "stories260k"))
    return model, tokenizer


def test_stories260k_has_the_published_loss(data, stories, tmp_path):
    """1.4221 nats per token over the first 60 texts, as the data's README measured it."""
    model, tokenizer = stories
    texts = json.loads((data / "text" / "tinystories_1000.json").read_text(encoding="utf8"))
    (tmp_path / "s.json").write_text(json.dumps(texts[:N_TEXTS]), encoding="utf8")
    ref = f"{tmp_path / 's.json'}?n_validation=1&n_test=1&max_length=512"
    task = load_task(ref, tokenizer, model)
    total = count = 0
    with torch.no_grad():
        for split in ("train", "validation", "test"):
            for lo in range(0, task.size(split), 20):
                indices = range(lo, min(lo + 20, task.size(split)))
                losses, tokens = task.losses(model, task.batch(split, indices))
                total, count = total + float(losses.sum()), count + int(tokens.sum())
    # The README lets texts be one token longer than the 512 positions that a row may have here.
    n_cut = int(task.notes[0].split()[1]) if task.notes else 0
    assert 21_266 - n_cut * 1 <= count <= 21_266
    assert total / count == pytest.approx(1.4221, abs=2e-3)


def test_adapters_learn_and_packmates_do_not_matter(data, stories):
    model, tokenizer = stories
    ref = f"text:{data / 'math' / 'svamp_test.jsonl'}"
    options = {"prompt": "{Body} {Question}", "answer": " {Answer}", "max_length": 128}
    task = load_task(ref, tokenizer, model, overlong="drop", **options)
    rates = (3e-3, 1e-5)
    trials = [
        Trial(model="", task="", method="lora", lr=lr, rank=4, batch_size=8, steps=20, alpha=8.0)
        for lr in rates
    ]
    before = task.scores(model, "test", range(task.size("test")), 1).mean()
    trained = train_pack(model, task, trials)
    try:
        learnt, barely = trained.evaluate("test").mean(-1)
        assert learnt < 0.7 * before and barely > 0.9 * before
        assert trained.outcomes[0].curve[-1][1] < 0.7 * trained.outcomes[0].curve[0][1]
    finally:
        trained.close()
    after = task.scores(model, "test", range(task.size("test")), 1).mean()
    assert torch.equal(before, after)


def test_vit_trains_its_new_head_and_adapters(data):
    model, processor = load_model(f"{data / 'models' / 'vit_tiny'}?num_labels=10")
    options = {"side": 64, "n_train": 400, "n_validation": 50, "n_test": 100}
    task = load_task(f"cifar10:{data / 'images'}", processor, model, **options)
    trial = Trial(
        model="", task="", method="lora", lr=3e-3, rank=4, batch_size=16, steps=25,
        modules_to_train=("classifier",),
    )  # fmt: skip
    trained = train_pack(model, task, [trial])
    try:
        assert trained.evaluate("test").mean() > 0.3  # chance is 0.1
    finally:
        trained.close()
