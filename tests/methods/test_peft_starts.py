"""From PEFT's start and with PEFT's tensors, ours has the same output, gradients and merged weight;
and what PEFT's starts do in bf16, on embeddings and on convolutions. A pin that fails says that
PEFT has changed: then our sentence about it can go.
"""

import pytest
import torch
from torch import nn

from loralab import adapt
from loralab.errors import UserError
from tests.interop.models import gpt2, logits
from tests.methods.test_against_peft import SHAPES, One, agree, move, pair
from tests.methods.test_peft_departures import LOFTQ, R, Words, codes_of_ours, layer_of, started

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


def loss(model, x):
    return model(x).square().mean()


def inputs(n):
    """Return [tokens, n] as PEFT's EVA needs them to be exact.

    Without a mean, which it takes away, and with a spectrum that falls: its SVD is a random sketch
    of 2 r directions, whose A is 0.2 from the exact one where the spectrum is flat.
    """
    x = torch.randn(64, n, generator=torch.Generator().manual_seed(0)) * 0.6 ** torch.arange(n)
    return torch.cat([x, -x])


# Our settings for PEFT's start, and alpha; with LoftQ PEFT's is right at alpha = r alone.
STARTS = {
    "pissa": ({}, 6.0),
    "olora": ({}, 6.0),
    "corda": ({}, 6.0),
    "eva": ({"rho": 1.0}, 6.0),
    "loftq": ({"n_iter": 1}, R),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("start", STARTS)
def test_same_start_and_then_same_output_and_gradients(start, shape, monkeypatch):
    (settings, alpha), x = STARTS[start], inputs(shape[0])
    if start in ("corda", "eva"):
        settings = settings | {"data": [x], "loss": loss}
    theirs = started(start, x, monkeypatch, One(*shape), alpha)
    ours = adapt(One(*shape), start, rank=R, alpha=alpha, **settings)
    found, bank = pair(theirs.base_model.model.layer), next(ours.pack.banks())[1]
    torch.testing.assert_close((bank.B @ bank.A)[0], found["B"] @ found["A"], rtol=1e-5, atol=1e-5)
    if start == "eva":  # B is 0
        torch.testing.assert_close(bank.A[0], found["A"], rtol=1e-5, atol=1e-5)
    # What ours is measured from is its own start, PEFT's is in the base that it has written.
    g = torch.Generator().manual_seed(3)
    move(theirs, g)
    agree(ours, theirs, pair, g)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lora_ga_from_peft_s_start(shape, monkeypatch):
    """PEFT's start is not the paper's, so it is given to ours: the rest agrees."""
    x = inputs(shape[0])
    theirs = started("lora_ga", x, monkeypatch, One(*shape), 6.0)
    data = {"data": [x], "loss": loss}
    ours = adapt(One(*shape), "lora_ga", rank=R, alpha=6.0, scaling="alpha/r", **data)
    bank, found = next(ours.pack.banks())[1], pair(theirs.base_model.model.layer)
    for name, value in found.items():
        getattr(bank, name + "_start").copy_(value.detach())
    g = torch.Generator().manual_seed(3)
    move(theirs, g)
    agree(ours, theirs, pair, g)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_step_0_in_bf16_is_the_base_here_and_off_in_peft(start):
    """By 0.33 %: PEFT keeps W - s B A in bf16, and the sum with the pair is rounded again."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(512, 512, bias=False)).bfloat16()

    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    config = peft.LoraConfig(r=16, lora_alpha=16, init_lora_weights=start, target_modules=["0"])
    with torch.no_grad():
        wanted = make()(x)
        theirs = peft.get_peft_model(make(), config)(x)
        assert torch.equal(adapt(make(), start, rank=16).model(x), wanted)
    off = (theirs.float() - wanted.float()).norm() / wanted.float().norm()
    assert off.item() == pytest.approx(0.0033, abs=0.0003)


@pytest.mark.parametrize("start", ["pissa", "olora", "corda", "eva", "orthogonal"])
def test_peft_ignores_starts_on_embeddings(start, monkeypatch):
    """Without a word, and after a start's own preparation too: A = 0 and B random, its default."""
    ids = torch.arange(12).repeat_interleave(torch.arange(12) + 1)
    layer = started(start, ids, monkeypatch, Words()).base_model.model.layer
    assert not layer.lora_embedding_A.default.any()
    assert layer.lora_embedding_B.default.std() > 0.5
    assert torch.equal(layer.base_layer.weight, Words().layer.weight)
    if start == "orthogonal":  # none of ours
        return
    data = {"data": [ids], "loss": loss} if start in ("corda", "eva") else {}
    ours = adapt(Words(), start, rank=R, targets=["layer"], **data)
    bank = next(ours.pack.banks())[1]
    assert torch.equal(ours.model(ids), Words()(ids))
    if start == "eva":  # along the most frequent words
        assert bank.A[0].argmax(-1).tolist() == [11, 10, 9] and not bank.B.any()
    else:
        assert bank.A.any() and bank.B.any() and bank.anchored


class Alone(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def other_layers():
    torch.manual_seed(0)
    return {
        "Embedding": (nn.Embedding(12, 8), torch.arange(12)),
        "Conv2d": (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5)),
        "Conv1d": (nn.Conv1d(4, 6, 3), torch.randn(2, 4, 5)),
    }


@pytest.mark.parametrize("kind", ["Embedding", "Conv2d", "Conv1d"])
def test_peft_s_loftq_fails_on_other_layers(kind, monkeypatch):
    codes_of_ours(monkeypatch)
    layer, x = other_layers()[kind]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'config'"):
        layer_of(peft.LoraConfig(r=R, init_lora_weights="loftq", loftq_config=LOFTQ), Alone(layer))
    layer, x = other_layers()[kind]
    if kind == "Conv1d":  # no layer of ours, with any method
        with pytest.raises(UserError, match="no Linear, Conv1D, Conv2d or Embedding layer"):
            adapt(Alone(layer), "loftq", rank=R, targets=["layer"])
        return
    wanted = layer(x)
    ours = adapt(Alone(layer), "loftq", rank=R, targets=["layer"])
    assert 0 < (ours.model(x) - wanted).norm() < 0.1 * wanted.norm()


def test_peft_s_loftq_takes_transformers_conv1d_for_its_transpose(monkeypatch):
    """A wide one fails; a square one starts farther from the base than the codes alone."""
    codes_of_ours(monkeypatch)
    config = {"r": R, "lora_alpha": R, "init_lora_weights": "loftq", "loftq_config": LOFTQ}
    with pytest.raises(RuntimeError, match="shape"):
        logits(peft.get_peft_model(gpt2(), peft.LoraConfig(**config, target_modules=["c_attn"])))
    first = lambda model: model.transformer.h[0].attn.c_proj  # noqa: E731
    W = first(gpt2()).weight
    theirs = peft.get_peft_model(
        gpt2(), peft.LoraConfig(**config, target_modules=["attn.c_proj"], fan_in_fan_out=True)
    )
    codes = first(theirs.base_model.model).base_layer.weight - W
    assert (first(theirs.merge_and_unload()).weight - W).norm() > 1.1 * codes.norm()
    ours = adapt(gpt2(), "loftq", rank=R, n_iter=1, targets=["attn.c_proj"])
    assert (first(ours.merge()).weight - W).norm() < 0.8 * codes.norm()
