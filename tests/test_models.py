import json

import pytest
import torch

from loralab.errors import UserError
from loralab.models import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a saved tiny ViT: quick, and it needs no tokenizer."""
    from transformers import ViTConfig, ViTForImageClassification

    path = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, num_labels=5,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(path)
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    (path / "preprocessor_config.json").write_text(json.dumps(said))
    return path


@pytest.fixture
def broken(folder, tmp_path):
    """Return a copy to damage."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_folder_loads_as_saved(folder):
    model, processor = load_model(str(folder))
    again, _ = load_model(str(folder), dtype="bf16")
    assert model.classifier.out_features == 5 and not model.training
    assert all(p.requires_grad for p in model.parameters())
    assert (processor.image_mean, processor.side) == ((0.1, 0.2, 0.3), 8)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_a_new_head_comes_from_its_seed_and_nothing_else(folder):
    state = torch.random.get_rng_state()
    heads = []
    for seed in (0, 0, 1):
        model, _ = load_model(f"{folder}?num_labels=3&head_seed={seed}")
        heads.append(model.classifier.weight.detach())
        assert model.classifier.bias.abs().sum() == 0
    old, _ = load_model(str(folder))
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].shape == (3, 8) and 0.005 < heads[0].std() < 0.05
    body = {n: p for n, p in old.named_parameters() if "classifier" not in n}
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in body.items())
    assert torch.equal(state, torch.random.get_rng_state())


def test_damaged_folders(broken):
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:4], b""):
        weights.write_bytes(content)
        with pytest.raises(UserError, match=r"model\.safetensors are truncated"):
            load_model(str(broken))
    weights.unlink()
    with pytest.raises(UserError, match=r"no .safetensors weights; pickled"):
        load_model(str(broken))
    weights.write_bytes(whole)
    (broken / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"configuration of .* cannot be read"):
        load_model(str(broken))
    (broken / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config.json"):
        load_model(str(broken))


def test_missing_weights_are_never_random(broken):
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    name = next(n for n in tensors if "layernorm" in n)
    save_file({n: t for n, t in tensors.items() if n != name}, broken / "model.safetensors")
    with pytest.raises(UserError, match=r"lack .*layernorm"):
        load_model(str(broken))


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("no/such/folder", "no folder 'no/such/folder'"),
        ("$NO_SUCH_VARIABLE/m", "environment variable NO_SUCH_VARIABLE"),
        ("tiny?num_labels=3", "'tiny' has no option but attn"),
        ("{folder}?labels=3", "did you mean num_labels"),
        ("{folder}?num_labels=1", "at least 2"),
        ("{folder}?kind=vision", "no kind of model 'vision'"),
        ("{folder}?kind=causal-lm", "cannot be loaded"),
        ("{folder}/config.json", "is a file"),
    ],
)
def test_wrong_references(folder, ref, message):
    with pytest.raises(UserError, match=message):
        load_model(ref.format(folder=folder))


def test_wrong_dtype(folder):
    with pytest.raises(UserError, match="unknown dtype 'float31'; did you mean float32"):
        load_model(str(folder), dtype="float31")


def test_an_unreachable_hub_is_said_at_once(monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    with pytest.raises(UserError, match=r"the hub cannot be reached .*ConnectionError"):
        load_model("some-org/some-model")


def test_a_language_model_as_classifier(tmp_path, folder):
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    inner = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path)
    language, tokenizer = load_model(str(tmp_path))
    assert tokenizer("a").input_ids == [0] and hasattr(language, "lm_head")
    assert language.config._attn_implementation == "sdpa"
    eager, _ = load_model(f"{tmp_path}?attn=eager")
    assert eager.config._attn_implementation == "eager"
    model, _ = load_model(f"{tmp_path}?num_labels=4")
    assert model.score.weight.shape == (4, 8)
    ids = torch.tensor([[0, 1, 0]])
    left = language.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(model.model(input_ids=ids).last_hidden_state, left)
