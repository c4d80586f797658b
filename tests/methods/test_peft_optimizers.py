"""PEFT's optimizers and our Rules of the same names. A pin that fails says that PEFT has changed:
then our sentence about it can go.
"""

import pytest
import torch
from torch import nn

from loralab import adapt
from tests.methods.test_against_peft import One
from tests.methods.test_peft_departures import Words

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own
R, LR = 3, 1e-2
EPS = 1e-12  # PEFT's LoRA-FA adds its eps elsewhere; this small it is nowhere


def loraplus(model, **more):
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=16, loraplus_weight_decay=0.0, **more
    )


def lorafa(model, alpha=R):
    from peft.optimizers import create_lorafa_optimizer

    return create_lorafa_optimizer(model, r=R, lora_alpha=alpha, lr=LR)


def pair_in_peft(model, alpha=R, **more):
    """Return PEFT's LoRA of a model with one layer."""
    config = peft.LoraConfig(r=R, lora_alpha=alpha, target_modules=["layer"], **more)
    return peft.get_peft_model(model, config)


def walk(model, optimizer, x, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def batch():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def test_lora_plus_and_the_magnitude():
    theirs = pair_in_peft(One(8, 12), use_dora=True)
    magnitude = theirs.base_model.model.layer.lora_magnitude_vector.default.weight
    groups = loraplus(theirs).param_groups
    (rate,) = (g["lr"] for g in groups if any(p is magnitude for p in g["params"]))
    assert rate == pytest.approx(16 * LR)
    rule = adapt(One(8, 12), "dora", rank=R, rule="lora_plus").pack.slots[0].recipe.rule
    assert (rule.lr_ratio("m"), rule.lr_ratio("A"), rule.lr_ratio("B")) == (1, 1, 16)


def test_lora_plus_steps_as_in_peft():
    theirs, ours = pair_in_peft(One(8, 12)), adapt(One(8, 12), "lora_plus", rank=R)
    layer, bank = theirs.base_model.model.layer, next(ours.pack.banks())[1]
    pairs = {"A": layer.lora_A.default.weight, "B": layer.lora_B.default.weight}
    with torch.no_grad():
        for name, value in pairs.items():
            getattr(bank, name).copy_(value)
    walk(theirs, loraplus(theirs), batch())
    walk(ours.model, ours.optimizer(LR), batch())
    for name, value in pairs.items():
        torch.testing.assert_close(getattr(bank, name)[0], value, rtol=1e-5, atol=1e-5)


def test_lora_plus_on_embeddings_has_one_tiny_rate_in_peft():
    """1e-6 for both factors unless told otherwise; Adam's first step is as long as the rate."""
    theirs = pair_in_peft(Words())
    ours = adapt(Words(), "lora_plus", rank=R, targets=["layer"])
    layer, bank = theirs.base_model.model.layer, next(ours.pack.banks())[1]
    factors = [layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]]
    factors += [bank.A, bank.B]
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in factors:
            p.copy_(torch.randn(p.shape, generator=g) * 0.01)
    before = [p.detach().clone() for p in factors]
    walk(theirs, loraplus(theirs), torch.arange(12), steps=1)
    walk(ours.model, ours.optimizer(LR), torch.arange(12), steps=1)
    moved = [(p - old).abs().max().item() for p, old in zip(factors, before, strict=True)]
    assert moved == pytest.approx([1e-6, 1e-6, LR, 16 * LR], rel=0.01)


def adam_on_B(A, x, inverse):
    """Return B after three steps of Adam on G times `inverse`, with s = 2."""
    model, B = One(8, 12), nn.Parameter(torch.zeros(12, R))
    optimizer = torch.optim.AdamW([B], lr=LR, eps=EPS, weight_decay=0.0)
    for _ in range(3):
        (G,) = torch.autograd.grad((model(x) + 2 * x @ A.T @ B.T).square().sum(), B)
        B.grad = G @ inverse
        optimizer.step()
    return B


@pytest.mark.parametrize("rows", ["orthonormal", "random"])
@pytest.mark.parametrize("project", [False, True])
def test_lora_fa_s_gradient_is_projected_in_peft(project, rows, monkeypatch):
    """PEFT steps along G (A Aᵀ)⁻¹ / s² (arXiv v2), we along G (v1) unless asked to."""
    # PEFT multiplies in bf16, which alone would put B 3e-4 from ours.
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    A, x = torch.randn(R, 8, generator=torch.Generator().manual_seed(1)), batch()
    if rows == "orthonormal":
        A = torch.linalg.qr(A.T).Q.T.contiguous()
    theirs = pair_in_peft(One(8, 12), alpha=2 * R)
    ours = adapt(One(8, 12), "lora_fa", rank=R, alpha=2 * R, project=project, eps=EPS)
    layer, bank = theirs.base_model.model.layer, next(ours.pack.banks())[1]
    with torch.no_grad():
        layer.lora_A.default.weight.copy_(A)
        bank.A.copy_(A)
    optimizer = lorafa(theirs, 2 * R)
    optimizer.param_groups[0]["eps"] = EPS
    walk(theirs, optimizer, x)
    walk(ours.model, ours.optimizer(LR), x)
    assert torch.equal(layer.lora_A.default.weight, A) and torch.equal(bank.A[0], A)
    B = layer.lora_B.default.weight
    inverse = torch.linalg.inv(A @ A.T) if project else torch.eye(R)
    torch.testing.assert_close(bank.B[0], adam_on_B(A, x, inverse), rtol=1e-5, atol=1e-6)
    if project or rows == "orthonormal":
        torch.testing.assert_close(bank.B[0], B, rtol=1e-5, atol=1e-5)
    else:
        assert (B - bank.B[0]).norm() > 0.2 * B.norm()


def test_lora_fa_takes_a_pseudo_inverse_in_every_step_in_peft(monkeypatch):
    """Of an A that is frozen. Ours, asked to project, takes none."""
    n_taken, pinv = [], torch.linalg.pinv
    monkeypatch.setattr(torch.linalg, "pinv", lambda *a, **k: n_taken.append(1) or pinv(*a, **k))
    theirs, ours = pair_in_peft(One(8, 12)), adapt(One(8, 12), "lora_fa", rank=R, project=True)
    walk(ours.model, ours.optimizer(LR), batch())
    assert not n_taken
    walk(theirs, lorafa(theirs), batch())
    assert len(n_taken) == 3


def test_lora_fa_s_memory_stays_behind_in_peft():
    """Its keys are names, and `load_state_dict` brings to a device what is a parameter's."""
    theirs, ours = pair_in_peft(One(8, 12)), adapt(One(8, 12), "lora_fa", rank=R)
    saved = []
    for model, optimizer in ((theirs, lorafa(theirs)), (ours.model, ours.optimizer(LR))):
        walk(model, optimizer, batch())
        saved.append(optimizer.state_dict())
        model.to("meta")
    optimizer = lorafa(theirs)
    optimizer.load_state_dict(saved[0])
    ((key, memory),) = optimizer.state.items()
    assert key == "base_model.model.layer.lora"
    assert memory["exp_avg_B"].device.type == memory["exp_avg_sq_B"].device.type == "cpu"
    theirs(batch().to("meta")).square().mean().backward()
    with pytest.raises(RuntimeError, match="device"):
        optimizer.step()
    optimizer = ours.optimizer(LR)
    optimizer.load_state_dict(saved[1])
    memory = optimizer.state_dict()["loralab"]
    assert len(memory) == 3 and {t.device.type for t in memory.values()} == {"meta"}


def test_lora_fa_and_the_magnitude():
    """PEFT takes two consecutive tensors for a pair, and DoRA has three."""
    config = peft.LoraConfig(r=R, use_dora=True, target_modules=["0.layer", "1.layer"])
    make = lambda: nn.Sequential(One(8, 12), One(12, 8))  # noqa: E731
    theirs = peft.get_peft_model(make(), config)
    with pytest.raises((TypeError, RuntimeError)):
        walk(theirs, lorafa(theirs), torch.ones(2, 8))
    ours = adapt(make(), "dora", rank=R, rule="lora_fa")
    before = {n: p.detach().clone() for n, p in ours.named_parameters().items()}
    walk(ours.model, ours.optimizer(LR), torch.ones(2, 8), steps=1)
    moved = {n.rpartition(".")[2] for n, p in ours.named_parameters().items()}
    assert moved == {"B", "m"}
    assert all(not torch.equal(before[n], p) for n, p in ours.named_parameters().items())
