import pytest
import torch

from loralab.errors import UserError
from loralab.models import tiny
from loralab.models.symbols import OPERATIONS, SymbolTokenizer, apply
from loralab.models.tiny import TinyRecipe, pretrain, tiny_base

SMALL = TinyRecipe(width=16, layers=1, heads=2, mlp_width=32, steps=8, batch_size=4)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path))
    return tmp_path / f"tiny-{SMALL.key}"


def forbid_pretraining(monkeypatch):
    def fail(*_):
        raise AssertionError("pre-trained although the cache is good")

    monkeypatch.setattr(tiny, "pretrain", fail)


def same(one, two):
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_pretraining_is_deterministic_and_leaves_global_randomness_alone():
    torch.manual_seed(1)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with torch.no_grad():
        one = pretrain(SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    torch.manual_seed(2)
    assert same(one, pretrain(SMALL))
    assert not same(one, pretrain(TinyRecipe(**{**vars(SMALL), "seed": 1})))


def test_the_second_call_reads_the_cache(cache, monkeypatch):
    seen = []
    first, _ = tiny_base(lambda fraction, message: seen.append(fraction), SMALL)
    assert seen[-1] == 1.0 and seen == sorted(seen)
    assert {file.name for file in cache.iterdir()} == {
        "model.safetensors",
        "config.json",
        "recipe.json",
    }
    forbid_pretraining(monkeypatch)
    second, _ = tiny_base(recipe=SMALL)
    assert same(first, second) and not second.training


def test_the_cached_folder_is_an_ordinary_transformers_model(cache):
    from transformers import AutoModelForCausalLM

    model, _ = tiny_base(recipe=SMALL)
    ids = torch.arange(12).view(2, 6)
    other = AutoModelForCausalLM.from_pretrained(cache)
    torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("damage", ["flip", "truncate", "recipe", "missing"])
def test_a_damaged_cache_is_built_again(cache, monkeypatch, damage):
    first, _ = tiny_base(recipe=SMALL)
    weights = cache / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
        weights.write_bytes(data)
    elif damage == "truncate":
        weights.write_bytes(data[:-8])
    elif damage == "recipe":
        (cache / "recipe.json").write_text("[")
    else:
        weights.unlink()
    assert same(first, tiny_base(recipe=SMALL)[0])
    forbid_pretraining(monkeypatch)
    assert same(first, tiny_base(recipe=SMALL)[0])


def test_an_unwritable_cache_warns_and_builds_in_memory(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="LORALAB_CACHE"):
        model, _ = tiny_base(recipe=SMALL)
    assert same(model, pretrain(SMALL))


def test_lines_are_right():
    tokenizer = SymbolTokenizer()
    text = "d a c b f"
    expected = {
        "copy": "d a c b f",
        "reverse": "f b c a d",
        "shift": "e b d c g",
        "sort": "a b c d f",
        "rotate": "a c b f d",
        "swap": "a d b c f",
    }
    assert expected.keys() == OPERATIONS.keys()
    first = tokenizer.encode("a")[0]
    letters = torch.tensor([tokenizer.encode(text)]) - first
    for name, answer in expected.items():
        assert tokenizer.decode(apply([name], letters)[0] + first) == answer
    ids = tiny.lines(("swap",), 3, 4, torch.Generator().manual_seed(0))
    words = tokenizer.decode(ids[0]).split()
    assert words[0] == "swap" and words[5] == "=" and words[-1] == "end"
    assert words[6:10] == [words[i] for i in (2, 1, 4, 3)]
    assert tokenizer.decode(ids[0], skip_special_tokens=True).split() == words[:-1]


def test_an_unknown_word_is_named():
    with pytest.raises(UserError, match="no token 'z'"):
        SymbolTokenizer().encode("copy a z")
    with pytest.raises(UserError, match="did you mean reverse"):
        apply(["revers"], torch.zeros(1, 3))
