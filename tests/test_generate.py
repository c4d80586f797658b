import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from loralab.training.generate import greedy

PAD, N_NEW = 0, 12


def make(name):
    torch.manual_seed(0)
    if name == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=40,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                initializer_range=0.3,
            )
        )
    elif name == "gpt2":
        config = GPT2Config(vocab_size=40, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        config.initializer_range = 0.3
        model = GPT2LMHeadModel(config)
    else:
        model = GPTNeoForCausalLM(
            GPTNeoConfig(
                vocab_size=40,
                max_position_embeddings=64,
                hidden_size=32,
                num_layers=2,
                num_heads=4,
                attention_types=[[["global", "local"], 1]],
                window_size=4,
                initializer_range=0.3,
            )
        )
    return model.eval()


def prompts(lengths):
    rng = torch.Generator().manual_seed(3)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        ids[row, -n:] = torch.randint(1, 40, (n,), generator=rng)
        mask[row, -n:] = 1
    return ids, mask


def reference(model, ids, mask, eos):
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=N_NEW,
        eos_token_id=eos,
        pad_token_id=PAD,
    )
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("lengths", [(5, 5, 5, 5), (7, 2, 4, 1)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neo"])
def test_equals_generate_and_each_row_alone(name, lengths):
    model, (ids, mask) = make(name), prompts(lengths)
    settings = {"max_new_tokens": N_NEW, "pad_token_id": PAD}
    free = greedy(model, ids, mask, eos_token_ids=[], **settings)
    assert free.shape == (4, N_NEW) and len(free.unique()) > 4
    eos = [int(free[0, 3]), int(free[1, 2])]  # so that some rows end early, at different steps
    together = greedy(model, ids, mask, eos_token_ids=eos, **settings)
    assert torch.equal(together, reference(model, ids, mask, eos))
    for row, n in enumerate(lengths):
        alone = greedy(model, ids[row : row + 1, -n:], eos_token_ids=eos, **settings)[0]
        assert torch.equal(together[row, : len(alone)], alone)
        assert (together[row, len(alone) :] == PAD).all()


def test_stops_when_all_rows_have_ended():
    model, (ids, mask) = make("llama"), prompts((4, 4))
    settings = {"max_new_tokens": N_NEW, "pad_token_id": PAD}
    first = greedy(model, ids, mask, eos_token_ids=[], **settings)[:, 0].tolist()
    assert greedy(model, ids, mask, eos_token_ids=first, **settings).tolist() == [
        [token] for token in first
    ]


def test_no_new_tokens_is_an_empty_answer():
    model, (ids, mask) = make("llama"), prompts((4, 4))
    out = greedy(model, ids, mask, max_new_tokens=0, eos_token_ids=[], pad_token_id=PAD)
    assert out.shape == (2, 0)
