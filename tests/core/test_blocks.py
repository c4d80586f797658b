"""Blocks whose tokens visit experts, against loops over tokens and experts (MixLoRA)."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from loralab import adapt, load
from loralab.core.pack import Pack, SlotSpec
from loralab.errors import UserError
from loralab.methods import build

MIX = dict(n_experts=3, top_k=2)


def draw(seed, *shape):
    return torch.tensor(np.random.default_rng(seed).normal(size=shape))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.down = nn.Linear(12, 8)

    def forward(self, x):
        return self.down(silu(self.gate(x)) * self.up(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_attn, self.mlp = nn.Linear(8, 8), FeedForward()
        for i, p in enumerate(self.parameters()):
            p.data = draw(i, *p.shape)

    def forward(self, x):
        return self.mlp(self.q_attn(x))


def at_random(pack, seed=50):
    for i, p in enumerate(pack.trainable().values()):
        p.data.copy_(draw(seed + i, *p.shape))
    return pack


def tensors(pack, slot):
    found = {}
    for name, site in zip(pack.names, pack.sites, strict=True):
        for lo, bank in zip(site.first, site.banks, strict=True):
            if lo <= slot < lo + bank.size:
                found[name] = {n: v[slot - lo].detach() for n, v in bank.tensors().items()}
    return found


def by_loops(t, x, r=2):
    """Return the output for x [rows, tokens, 8]: every token, every expert, one after another."""
    bare, y = Model(), torch.empty_like(x)

    def layer(name, h, ranks):
        A, B = t[name]["A"][ranks], t[name]["B"][:, ranks]
        return bare.get_submodule(name)(h) + B @ (A @ h)

    for at in np.ndindex(*x.shape[:-1]):
        h = layer("q_attn", x[at], slice(None))
        p = (t["mlp.gate"]["W_g"] @ h).softmax(-1)
        best = p.argsort(descending=True)[: MIX["top_k"]].tolist()
        y[at] = 0
        for e in best:
            own = slice(e * r, e * r + r)
            inner = silu(layer("mlp.gate", h, own)) * layer("mlp.up", h, own)
            y[at] += p[e] / sum(p[b] for b in best) * layer("mlp.down", inner, own)
    return y


def llama_like():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).train()


def spec(method="mixlora", **more):
    settings = MIX if method == "mixlora" else {}
    return SlotSpec(build(method, **settings), rank=2, **more)


def test_experts_are_whole_feed_forward_blocks():
    pack, x = at_random(Pack(Model(), [spec()])), draw(9, 2, 5, 8)
    t = tensors(pack, 0)
    assert [n for n in t if "W_g" in t[n]] == ["mlp.gate"]
    torch.testing.assert_close(pack.model(x), by_loops(t, x), rtol=1e-9, atol=1e-9)
    grads = torch.autograd.grad(pack.model(x).square().sum(), list(pack.trainable().values()))
    assert all(grad.any() for grad in grads)


def test_the_gradient_is_that_of_the_loops():
    pack, x = at_random(Pack(Model(), [spec()])), draw(9, 1, 3, 8)
    ours = torch.autograd.grad(pack.model(x).square().sum(), list(pack.trainable().values()))
    for p, grad in zip(pack.trainable().values(), ours, strict=True):
        at = tuple(int(i) for i in np.unravel_index(int(grad.abs().argmax()), grad.shape))
        found = []
        for step in (1e-5, -1e-5):
            p.data[at] += step
            found.append(by_loops(tensors(pack, 0), x).square().sum())
            p.data[at] -= step
        assert ((found[0] - found[1]) / 2e-5).item() == pytest.approx(grad[at].item(), rel=1e-5)


@pytest.mark.parametrize("rows", [[2, 2, 2], [1, 3, 2]])
def test_neighbours_of_other_methods_run_the_block_once(rows):
    specs = [spec(), spec("lora"), spec(seed=1)]
    pack, x = at_random(Pack(Model(), specs)), draw(9, sum(rows), 5, 8)
    with pack.rows(rows):
        first, second, third = pack.model(x).split(rows)
    parts = x.split(rows)
    torch.testing.assert_close(first, by_loops(tensors(pack, 0), parts[0]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(third, by_loops(tensors(pack, 2), parts[2]), rtol=1e-9, atol=1e-9)
    bare = Model()
    for name, own in tensors(pack, 1).items():
        bare.get_submodule(name).weight.data += own["B"] @ own["A"]
    torch.testing.assert_close(second, bare(parts[1]), rtol=1e-9, atol=1e-9)
    pack.keep([1, 2])
    with pack.rows(rows[1:]):
        kept = pack.model(torch.cat(parts[1:]))
    torch.testing.assert_close(kept, torch.cat([second, third]), rtol=1e-12, atol=1e-12)


def test_the_users_mask_holds_inside_given_and_the_models_own_outside():
    """Whatever was run before, and whichever names the user gives."""
    model = llama_like()
    adapter = adapt(model, "mixlora", rank=2, **MIX)
    ids, own = torch.randint(0, 20, (2, 5)), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    other = torch.tensor([[0, 1, 1, 1, 1], [1] * 5])

    def loss(mask, **given):
        with adapter.given(**given):
            model(input_ids=ids, attention_mask=mask)
        return adapter.penalty().item()

    wanted = loss(own), loss(other)
    assert wanted[0] != wanted[1]
    given = loss(own, valid=other)
    assert loss(own, valid=other) == given != wanted[0]
    assert (loss(own), loss(other), loss(own)) == (*wanted, wanted[0])


def test_slots_of_one_pack_may_adapt_different_layers_of_a_block():
    """Another layer leads the block for each; every slot is what it is alone."""
    specs = [spec(), spec(targets=("q_attn", "up", "down"), seed=1), spec(targets=("up",), seed=2)]
    x = draw(9, 3, 5, 8)
    pack = at_random(Pack(Model(), specs))
    y = pack.model(x)
    for k, one in enumerate(specs):
        alone = Pack(Model(), [one])
        for name, own in tensors(alone, 0).items():
            for n, value in own.items():
                value.copy_(tensors(pack, k)[name][n])
        torch.testing.assert_close(y[k : k + 1], alone.model(x[k : k + 1]), rtol=1e-9, atol=1e-9)


def test_an_empty_batch_passes():
    pack = Pack(Model(), [spec(), spec(seed=1)])
    with pack.rows([0, 0]):
        assert pack.model(draw(9, 0, 5, 8)).shape == (0, 5, 8)


def test_it_starts_at_the_base_leaves_no_trace_and_survives_copies_and_files(tmp_path):
    x, bare = draw(9, 2, 5, 8), Model()
    adapter = adapt(Model(), "mixlora", rank=2, **MIX)
    torch.testing.assert_close(adapter.model(x), bare(x), rtol=1e-12, atol=1e-12)
    at_random(adapter.pack)
    y = adapter.model(x)
    assert not torch.allclose(y, bare(x))
    assert torch.equal(copy.deepcopy(adapter.model)(x), y)
    with adapter.disable():
        assert torch.equal(adapter.model(x), bare(x))
    adapter.save(tmp_path)
    again = load(Model(), tmp_path)
    assert torch.equal(again.model(x), y)
    model = again.remove()
    assert type(model.mlp) is FeedForward and torch.equal(model(x), bare(x))


def test_the_balance_loss_counts_every_token_once_and_padding_never():
    pack, x = at_random(Pack(Model(), [spec()])), draw(9, 2, 5, 8)
    t, h = tensors(pack, 0), Model().q_attn(x)
    h = h + x @ (t["q_attn"]["B"] @ t["q_attn"]["A"]).T
    valid = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).double()
    p = (h @ t["mlp.gate"]["W_g"].T).softmax(-1)[valid == 1]
    first = torch.zeros_like(p).scatter(1, p.topk(1).indices, 1.0)
    given = torch.zeros_like(p).scatter(1, p.topk(2).indices, p.topk(2).values)
    wanted = 0.01 * 3 * (first.mean(0) * given.mean(0)).sum()
    with pack.given(valid=valid):
        pack.model(x)
    with pack.given(valid=torch.ones_like(valid)):
        pack.model(x)
        assert not torch.allclose(pack.penalty()[0] * pack.sites[0].banks[0].site.n_layers, wanted)
        pack.model(x)
    with pack.given(valid=valid):
        pack.model(x)
    # Two "transformer layers": the attention's and the feed-forward's module.
    n_layers = pack.sites[0].banks[0].site.n_layers
    torch.testing.assert_close(pack.penalty()[0].detach() * n_layers, wanted)


def test_blocks_that_cannot_run_twice_are_refused():
    class Two(FeedForward):
        def forward(self, x, y):
            return super().forward(x + y)

    model = nn.ModuleDict({"mlp": Two()})
    adapt(model, "mixlora", rank=2)
    with pytest.raises(UserError, match="block 'mlp' takes 2 inputs"):
        model["mlp"](torch.randn(1, 3, 8), torch.randn(1, 3, 8))

    class Pair(FeedForward):
        def forward(self, x):
            return super().forward(x), x

    model = nn.ModuleDict({"mlp": Pair()})
    adapt(model, "mixlora", rank=2)
    with pytest.raises(UserError, match="gives more than one tensor"):
        model["mlp"](torch.randn(1, 3, 8))


def test_a_module_with_attention_in_it_is_no_feed_forward_block():
    class Layer(FeedForward):
        def __init__(self):
            super().__init__()
            self.self_attn = nn.Linear(8, 8)

    with pytest.raises(UserError, match="'only' also holds 'self_attn'"):
        adapt(nn.ModuleDict({"only": Layer()}), "mixlora", rank=2)


def test_a_layer_that_stands_alone_is_a_block_by_itself():
    model = Model()
    pack = Pack(model, [spec(targets=("up",))])
    assert not hasattr(model.mlp, "loralab")
    assert set(tensors(pack, 0)["mlp.up"]) == {"A", "B", "W_g"}
