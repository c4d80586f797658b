import json

import pytest
import torch
from torch.nn.functional import log_softmax

from loralab.errors import UserError
from loralab.tasks import load_task
from loralab.tasks.likelihood import head_stands_alone, row_losses

LETTERS = [chr(97 + i) for i in range(26)]


def write(path, n=40, longest=6):
    rows = [
        {
            "prompt": " ".join(LETTERS[(i + k) % 26] for k in range(1 + i % longest)),
            "completion": " ".join(LETTERS[(3 * i + k) % 26] for k in range(1 + i % 4)),
        }
        for i in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return rows


@pytest.fixture
def task(tmp_path, words, llama):
    write(tmp_path / "d.jsonl")
    return load_task(f"{tmp_path / 'd.jsonl'}?n_validation=8", words, llama)


def test_the_split_is_a_partition_fixed_by_the_seed(tmp_path, words):
    rows = write(tmp_path / "d.jsonl")
    one, same, other = (load_task(f"{tmp_path / 'd.jsonl'}?seed={s}", words) for s in (0, 0, 1))

    def shown(task, split):
        return [tuple(i.ids) for i in task._items(split)]

    every = [shown(one, s) for s in ("train", "validation", "test")]
    assert [len(e) for e in every] == [32, 4, 4]
    wanted = [tuple(words(r["prompt"] + " " + r["completion"] + " <end>").input_ids) for r in rows]
    assert sorted(row for split in every for row in split) == sorted(wanted)
    assert every[0] == shown(same, "train") != shown(other, "train")


def test_only_answer_tokens_count(task, llama):
    """The loss equals a sum written out token by token, each row run alone without padding."""
    batch = task.batch("train", [0, 3, 5])
    total, count = task.losses(llama, batch)
    for row, item in enumerate(task._items("train")[i] for i in (0, 3, 5)):
        ids = torch.tensor([item.ids])
        logp = log_softmax(llama(input_ids=ids).logits[0], -1)
        wanted = -sum(logp[t - 1, item.ids[t]] for t in range(item.n_prompt, len(item.ids)))
        torch.testing.assert_close(total[row], wanted)
        assert count[row] == len(item.ids) - item.n_prompt
        assert item.ids[-1] == task.tokenizer.eos_token_id


def test_head_at_answers_equals_head_everywhere(task, llama):
    batch = task.batch("train", range(6))
    results = []
    for sparse in (True, False):
        weight = llama.model.layers[0].mlp.up_proj.weight
        total, count = row_losses(llama, batch, sparse)
        results.append((total, count, torch.autograd.grad(total.sum(), weight)[0]))
    assert head_stands_alone(llama)
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_the_head_is_read_sparsely_only_where_that_is_the_same(task, llama, monkeypatch):
    calls = []
    llama.lm_head.register_forward_hook(lambda m, x, y: calls.append(tuple(y.shape)))
    batch = task.batch("train", range(4))
    n_answer = int((batch["labels"] != -100).sum())
    task.losses(llama, batch)
    llama.lm_head.loralab = object()  # an adapted head sees the packed rows as they are
    task.losses(llama, batch)
    assert calls == [(n_answer, 29), (*batch["input_ids"].shape, 29)]
    del llama.lm_head.loralab
    plain = type(llama).forward

    def capped(self, **inputs):
        out = plain(self, **inputs)
        out.logits = 3 * torch.tanh(out.logits / 3)
        return out

    monkeypatch.setattr(type(llama), "forward", capped)
    assert not head_stands_alone(llama)


def test_rows_do_not_see_each_other(task, llama):
    alone, _ = task.losses(llama, task.batch("train", [1]))
    longest = max(range(task.size("train")), key=lambda i: len(task._items("train")[i].ids))
    together, _ = task.losses(llama, task.batch("train", [longest, 1]))
    torch.testing.assert_close(together[1], alone[0])


def test_scores_are_slot_major_means(task, llama):
    scores = task.scores(llama, "test", [2, 0, 1], copies=2)
    assert scores.shape == (2, 3) and torch.equal(scores[0], scores[1])
    total, count = task.losses(llama, task.batch("test", [2, 0, 1]))
    torch.testing.assert_close(scores[0], (total / count).detach())


def test_exact_match_agrees_with_generate(tmp_path, words, llama):
    """Answers written by the model itself all match; changed ones do not."""
    rows = write(tmp_path / "d.jsonl", n=12)
    for i, row in enumerate(rows):
        ids = words(row["prompt"], return_tensors="pt").input_ids
        out = llama.generate(
            ids, max_new_tokens=5, do_sample=False, eos_token_id=1, pad_token_id=0
        )[0, ids.shape[1] :].tolist()
        out = out[: out.index(1)] if 1 in out else out
        row["completion"] = words.decode(out) + ("" if i % 3 else " z z z z z z")
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ref = f"{tmp_path / 'd.jsonl'}?metric=exact match&max_new_tokens=5&n_test=10&n_validation=1"
    task = load_task(ref, words, llama)
    assert (task.metric, task.higher_is_better) == ("exact match", True)
    got = task.scores(llama, "test", range(10), copies=2)
    wanted = [float(not item.answer.endswith("z z z z z z")) for item in task._items("test")]
    assert got.tolist() == [wanted, wanted] and 0 < sum(wanted) < 10


def test_long_rows_are_cut_or_dropped_and_said(tmp_path, words, llama):
    write(tmp_path / "d.jsonl", longest=12)
    ref = f"{tmp_path / 'd.jsonl'}?max_length=6"
    cut, dropped = (load_task(f"{ref}&overlong={how}", words, llama) for how in ("cut", "drop"))
    n_long = 40 - sum(dropped.size(s) for s in ("train", "validation", "test"))
    assert 0 < n_long < 40
    assert cut.notes == (f"train: {n_long} of 40 rows are longer than 6 tokens and were cut",)
    assert dropped.notes[0].endswith("and were left out")
    items = [i for s in ("train", "validation", "test") for i in cut._items(s)]
    assert len(items) == 40 and max(len(i.ids) for i in items) == 6
    assert all(1 <= i.n_prompt < len(i.ids) for i in items)


def test_bare_text_counts_all_but_its_first_token(tmp_path, words, llama):
    (tmp_path / "d.json").write_text(json.dumps(["a b c d"] * 10))
    batch = load_task(str(tmp_path / "d.json"), words, llama).batch("train", [0])
    assert batch["labels"].tolist() == [[-100, 4, 5, 6]]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?max_lenght=4", "no option 'max_lenght'; did you mean max_length"),
        ("?max_length=four", "must be a whole number"),
        ("?max_length=64", "more than the model's 32 positions"),
        ("?max_length=2&overlong=drop", "all 40 rows are longer"),
        ("?metric=accuracy", "unknown metric 'accuracy'"),
        ("?n_train=100", "train split has 32 rows where 100 are needed"),
        ("?n_test=20&n_validation=20", "train split has 0 rows"),
        ("?answer", "needs the form name=value"),
    ],
)
def test_wrong_options(tmp_path, words, llama, query, message):
    write(tmp_path / "d.jsonl")
    with pytest.raises(UserError, match=message):
        load_task(f"{tmp_path / 'd.jsonl'}{query}", words, llama)


def test_unknown_references(monkeypatch, words):
    monkeypatch.delenv("NO_SUCH_FOLDER", raising=False)
    for ref, message in {
        "gsm9k": "did you mean gsm8k",
        "no/such.jsonl": "No such file",
        "$NO_SUCH_FOLDER/d.jsonl": "environment variable NO_SUCH_FOLDER",
        "nothing:here": "no task, file or folder",
        "": "names nothing",
    }.items():
        with pytest.raises(UserError, match=message):
            load_task(ref, words)
    with pytest.raises(UserError, match="symbols of the model 'tiny' only"):
        load_task("synthetic", words)


def test_gsm8k_compares_final_numbers():
    from loralab.tasks.gsm8k import final_number

    texts = {"so 3.\n#### 1,234": "1234", "#### 7.50 left": "7.5", "#### -2": "-2", "#### x": "",
             "it is 3, then 40.": "40", "none": ""}  # fmt: skip
    assert {t: final_number(t) for t in texts} == texts


def test_gsm8k_without_annotations(tmp_path, words):
    rows = [{"question": "a", "answer": "b <<1+1=2>> c\n#### 2"}] * 9
    (tmp_path / "gsm8k_train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "other_train.jsonl").write_text("never read")
    task = load_task(f"gsm8k:{tmp_path}?annotations=false", words)
    assert task._items("train")[0].answer == " b  c\n#### 2"
    with pytest.raises(UserError, match=r"'annotations' .* must be true or false"):
        load_task(f"gsm8k:{tmp_path}?annotations=0", words)
