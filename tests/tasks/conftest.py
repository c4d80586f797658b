import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def data():
    """Return the folder of real data, or skip."""
    said = os.environ.get("LORALAB_DATA")
    folder = Path(said) if said else Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
    if not (folder / "models" / "stories260k" / "config.json").is_file():
        pytest.skip("no real data: set LORALAB_DATA to its folder")
    return folder.resolve()


@pytest.fixture(scope="session")
def words():
    """Return a word-level tokenizer with BOS-less prompts, an EOS and padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(97 + i) for i in range(26)]
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<end>", "<unk>", *letters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )


@pytest.fixture
def llama():
    """Return a random two-layer Llama in fp64 that fits `words`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture
def vit():
    """Return a random one-layer ViT for 8-pixel images of three classes."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, num_labels=3, initializer_range=0.5,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()
