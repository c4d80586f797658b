"""Where installed PEFT departs from the papers, and what we do there. A pin that fails says that
PEFT has changed: then our sentence about it can go.
"""

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from loralab import adapt, load
from loralab.core.quantize import dequantize, quantize
from loralab.errors import UserError
from loralab.interop.export import export
from tests.interop.models import IDS, gpt2, llama, logits
from tests.methods.test_against_peft import One

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own
R = 3
LOFTQ = {"loftq_bits": 4, "loftq_iter": 1}


def layer_of(config, model=None):
    config.target_modules = ["layer"]
    return peft.get_peft_model(model or One(8, 12), config).base_model.model.layer


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8)], ids=str)
def test_starts_that_both_have_are_the_same_but_peft_writes_the_base(start, shape):
    layer = layer_of(peft.LoraConfig(r=R, lora_alpha=R, init_lora_weights=start), One(*shape))
    ours = adapt(One(*shape), start, rank=R)
    bank, W = next(ours.pack.banks())[1], One(*shape).layer.weight
    product = layer.lora_B.default.weight @ layer.lora_A.default.weight
    torch.testing.assert_close((bank.B @ bank.A)[0], product, rtol=1e-5, atol=1e-5)
    residual = layer.base_layer.weight
    torch.testing.assert_close(W - product, residual, rtol=1e-5, atol=1e-5)
    # Disabled, PEFT's model is therefore not the base; ours is, to the bit.
    assert (residual - W).norm() > 0.1 * W.norm()
    x = torch.ones(2, shape[0])
    with ours.disable():
        assert torch.equal(ours.model(x), One(*shape)(x))


def codes_of_ours(monkeypatch):
    """Let PEFT's LoftQ, in one round, take our codes: its own need a GPU."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    def loftq(W, num_bits, reduced_rank, num_iter):
        Q = dequantize(*quantize(W.detach(), num_bits, 64), W.shape)
        split = _low_rank_decomposition(W - Q, reduced_rank=reduced_rank)
        return Q, split["R"], split["L"]

    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", loftq)


def started(start, x, monkeypatch, model=None, alpha=R):
    """Return PEFT's model after a start."""
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    # PEFT takes its dataclass from attrs, which it does not ask for.
    monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclass))
    from peft.tuners.lora.corda import preprocess_corda

    codes_of_ours(monkeypatch)
    own = {
        "corda": {"corda_config": CordaConfig()},
        "eva": {"eva_config": peft.EvaConfig(rho=1.0, use_label_mask=False)},
        "lora_ga": {"lora_ga_config": LoraGAConfig()},
        "loftq": {"loftq_config": LOFTQ},
    }
    model = model or One(8, 12)
    config = peft.LoraConfig(
        r=R,
        lora_alpha=alpha,
        init_lora_weights=start,
        target_modules=["layer"],
        **own.get(start, {}),
    )
    if start == "corda":
        preprocess_corda(model, config, lambda: model(x))
    if start == "lora_ga":
        preprocess_loraga(model, config, lambda: model(x).square().mean().backward())
    theirs = peft.get_peft_model(model, config)
    if start == "eva":
        peft.initialize_lora_eva_weights(
            theirs,
            [x],
            forward_fn=lambda model, x: model(x),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=lambda x, *_: x[0] if isinstance(x, tuple) else x,
            show_progress_bar=False,
        )
    return theirs


@pytest.mark.parametrize("start", ["corda", "lora_ga", "loftq"])
def test_peft_s_base_is_another_after_other_starts_too(start, monkeypatch):
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    theirs, W, wanted = started(start, x, monkeypatch), One(8, 12).layer.weight, One(8, 12)(x)
    layer = theirs.base_model.model.layer
    found, delta = layer.base_layer.weight, layer.get_delta_weight("default")
    assert (found - W).norm() > 0.02 * W.norm()
    if start != "loftq":  # whose start is near the base on purpose
        torch.testing.assert_close(found + delta, W, rtol=1e-5, atol=1e-5)
    with theirs.disable_adapter():
        assert (theirs(x) - wanted).abs().max() > 0.05
    more = {} if start == "loftq" else {"data": [x]}
    ours = adapt(One(8, 12), start, rank=R, loss=lambda model, x: model(x).square().mean(), **more)
    assert torch.equal(ours.model.layer.weight, W)
    with ours.disable():
        assert torch.equal(ours.model(x), wanted)


def test_lora_ga_scales_by_the_gradient_in_peft():
    """The paper's factors have orthogonal rows and columns of one length, whatever the gradient's
    size; PEFT's B shrinks with the gradient and its A keeps length 1.
    """
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))

    def loss_of(model, scale):
        return scale * model(x).square().mean()

    lengths = {}
    for scale in (1.0, 1e-3):
        model = One(8, 12)
        config = peft.LoraConfig(
            r=R,
            init_lora_weights="lora_ga",
            target_modules=["layer"],
            lora_ga_config=LoraGAConfig(),
        )
        preprocess_loraga(model, config, lambda m=model, s=scale: loss_of(m, s).backward())
        layer = peft.get_peft_model(model, config).base_model.model.layer
        ours = adapt(One(8, 12), "lora_ga", rank=R, data=[scale], loss=lambda m, s: loss_of(m, s))
        bank = next(ours.pack.banks())[1]
        lengths[scale] = {
            "theirs": (
                layer.lora_A.default.weight.norm(dim=1),
                layer.lora_B.default.weight.norm(dim=0),
            ),
            "ours": (bank.A[0].norm(dim=1), bank.B[0].norm(dim=0)),
        }
    for A, B in (lengths[scale]["ours"] for scale in lengths):
        wanted = torch.full((R,), 12**0.25 / 16**0.5)  # m^(1/4) / sqrt(gamma)
        torch.testing.assert_close(A, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(B, wanted, rtol=1e-5, atol=1e-5)
    (A1, B1), (A2, B2) = (lengths[scale]["theirs"] for scale in (1.0, 1e-3))
    torch.testing.assert_close(A1, A2)
    assert (B2 < 0.01 * B1).all()


def test_dora_as_lora_loses_its_magnitude_in_peft_and_is_refused_here(tmp_path):
    layer = layer_of(peft.LoraConfig(r=R, use_dora=True))
    with torch.no_grad():
        layer.lora_magnitude_vector.default.weight.mul_(1.5)
    assert layer.supports_lora_conversion()
    assert not layer.get_delta_weight("default").any()
    with pytest.raises(UserError, match="magnitude of its rows is not low-rank"):
        export(adapt(One(8, 12), "dora", rank=R), tmp_path, "lora")


def test_disabling_unfreezes_in_peft_only():
    theirs = peft.get_peft_model(One(8, 12), peft.LoraConfig(r=R, target_modules=["layer"]))
    A = theirs.base_model.model.layer.lora_A.default.weight
    A.requires_grad_(False)
    with theirs.disable_adapter():
        pass
    assert A.requires_grad
    ours = adapt(One(8, 12), "lora_fa", rank=R)
    with ours.disable():
        pass
    assert not next(ours.pack.banks())[1].A.requires_grad


def test_the_penalty_of_adalora_is_in_peft_s_evaluation_loss():
    """Even disabled. A model without a task_type has the penalty nowhere, in training neither."""
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(llama(), config).eval()
    base = llama()
    with torch.no_grad():
        wanted = base(input_ids=IDS, labels=IDS).loss
        assert theirs(input_ids=IDS, labels=IDS).loss > wanted + 0.1
        with theirs.disable_adapter():
            assert theirs(input_ids=IDS, labels=IDS).loss > wanted + 0.1
        ours = adapt(llama(), "adalora", rank=2, targets=["q_proj"]).model
        torch.testing.assert_close(ours(input_ids=IDS, labels=IDS).loss, wanted)


def test_a_loaded_adalora_has_no_loss_in_peft(tmp_path):
    targets = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(llama(), peft.AdaLoraConfig(total_step=9, **targets))
    theirs.save_pretrained(tmp_path / "theirs")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "theirs")
    theirs(input_ids=IDS)
    with pytest.raises(AttributeError, match="trainable_adapter_name"):
        theirs(input_ids=IDS, labels=IDS)
    adapt(llama(), "adalora", rank=2, targets=["q_proj"]).save(tmp_path / "ours")
    for folder in ("theirs", "ours"):
        ours = load(llama(), tmp_path / folder).model
        wanted = llama()(input_ids=IDS, labels=IDS).loss
        torch.testing.assert_close(ours(input_ids=IDS, labels=IDS).loss, wanted)


def test_olora_on_a_wide_conv1d_fails_in_peft():
    config = peft.LoraConfig(r=R, init_lora_weights="olora", target_modules=["c_attn"])
    with pytest.raises(RuntimeError, match="shape"):
        logits(peft.get_peft_model(gpt2(), config))
    ours = adapt(gpt2(), "olora", rank=R, targets=["c_attn"])
    assert torch.equal(logits(ours.model), logits(gpt2()))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Embedding(12, 8)

    def forward(self, ids):
        return self.layer(ids)
