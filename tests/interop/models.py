"""Two tiny random models: nn.Linear with grouped queries (Llama) and Conv1D (GPT-2)."""

import torch
from safetensors.torch import save_file

from loralab import adapt
from loralab.core.adapter import load
from loralab.methods import all_methods

IDS = torch.arange(21).view(3, 7) % 23


def llama(kv_heads=2):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def biased():
    """Return a Llama whose adapted layers all have a bias, as Qwen2's attention has."""
    from transformers import LlamaForCausalLM

    config = llama().config
    config.attention_bias = config.mlp_bias = True
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.3)
    return model


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=32,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model, parameters, steps=3, lr=3e-2):
    """A few steps of AdamW: what is compared should have left its start."""
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


def trained(method, make=llama, steps=3, **options):
    """Return an adapter a few steps of its own rule after its start."""
    batch = {"input_ids": IDS, "labels": IDS}
    adapter = adapt(make(), method, **{"rank": 4, "seed": 3, "data": [batch]} | options)
    train_on(adapter, 3e-2, steps)
    return adapter


def train_on(adapter, lr, steps, n_steps=None):
    """A few steps of the adapter's own rule."""
    batch = {"input_ids": IDS, "labels": IDS}
    held_out = lambda: adapter.model(**batch).loss  # noqa: E731  # for the methods that look at it
    optimizer = adapter.optimizer(lr, n_steps=n_steps or max(steps, 1), held_out=held_out)

    def closure():
        optimizer.zero_grad()
        loss = adapter.model(**batch).loss
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def one_per_form():
    """Return a method for every Form of the catalogue: files depend on nothing else."""
    return list({type(m.recipe.form): n for n, m in reversed(all_methods().items())}.values())


def write_logits(folder, out):
    """Load an adapter on a fresh base and write the logits: what another process runs."""
    model = llama()
    load(model, folder)
    save_file({"logits": logits(model)}, out)
