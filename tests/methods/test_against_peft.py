"""Installed PEFT as an oracle: its tensors copied in give its outputs and its gradients."""

import pytest
import torch
from torch import nn

from loralab import adapt

peft = pytest.importorskip("peft")

R, ALPHA = 4, 6.0
SHAPES = [(8, 12), (12, 8)]


class One(nn.Module):
    def __init__(self, n, m):
        super().__init__()
        g = torch.Generator().manual_seed(7)
        self.layer = nn.Linear(n, m)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)

    def forward(self, x):
        return self.layer(x)


def pair(layer):
    return {"A": layer.lora_A.default.weight, "B": layer.lora_B.default.weight}


def dora(layer):
    return pair(layer) | {"m": layer.lora_magnitude_vector.default.weight}


def loha(layer):
    names = {"B1": "w1_a", "A1": "w1_b", "B2": "w2_a", "A2": "w2_b"}
    return {ours: getattr(layer, f"hada_{theirs}")["default"] for ours, theirs in names.items()}


def vera(layer):
    trained = {"d": layer.vera_lambda_d["default"], "b": layer.vera_lambda_b["default"]}
    return trained | {"A": layer.vera_A["default"], "B": layer.vera_B["default"]}


def gralora(layer):
    return {"A": layer.gralora_A["default"], "B": layer.gralora_B["default"]}


def gralora_hybrid(layer):
    return gralora(layer) | {
        "A_hybrid": layer.gralora_A_general["default"].weight,
        "B_hybrid": layer.gralora_B_general["default"].weight,
    }


def randlora(layer):
    """PEFT flattens B's columns base by base but A's rows rank by rank; we pair like with like."""
    B = layer.randlora_B["default"]
    n, r = B.shape[1:]
    return {
        "A": layer.randlora_A["default"][:, 0],
        "B": B.flatten(1).unflatten(1, (r, n)).transpose(1, 2).flatten(1),
        "Lambda": layer.randlora_lambda["default"].T,
        "Gamma": layer.randlora_gamma["default"],
    }


def adalora(layer):
    E = layer.lora_E["default"][:, 0]
    return {"P": layer.lora_B["default"], "Lambda": E, "Q": layer.lora_A["default"]}


def ada_config(**more):
    return peft.AdaLoraConfig(init_r=6, target_r=R, total_step=10, **more)


# method, settings of ours, PEFT's config for the same s, PEFT's tensors under our names
CASES = {
    "lora": ("lora", {}, peft.LoraConfig(r=R, lora_alpha=ALPHA), pair),
    "rslora": ("rslora", {}, peft.LoraConfig(r=R, lora_alpha=ALPHA, use_rslora=True), pair),
    "dora": ("dora", {}, peft.LoraConfig(r=R, lora_alpha=ALPHA, use_dora=True), dora),
    "loha": ("loha", {}, peft.LoHaConfig(r=R, alpha=ALPHA), loha),
    "vera": ("vera", {}, peft.VeraConfig(r=R), vera),
    "gralora": ("gralora", {}, peft.GraloraConfig(r=R, alpha=ALPHA, gralora_k=2), gralora),
    # Known difference: PEFT adds the hybrid rank to r, here and in the authors' code it is in r.
    "gralora hybrid": (
        "gralora",
        {"hybrid_rank": 2},
        peft.GraloraConfig(r=R - 2, hybrid_r=2, alpha=ALPHA, gralora_k=2),
        gralora_hybrid,
    ),
    "randlora": (
        "randlora",
        {"scaling": "alpha/r"},
        peft.RandLoraConfig(r=R, randlora_alpha=ALPHA),
        randlora,
    ),
    # Known difference: PEFT divides alpha by the starting rank 6, we by the final mean rank 4.
    "adalora": ("adalora", {}, ada_config(lora_alpha=ALPHA * 6 / 4), adalora),
}


def outcome(model, x, tensors):
    """Return the output, and the gradients of a fixed functional for x and the tensors."""
    x = x.clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    grads = torch.autograd.grad((y * weights).sum(), [x, *tensors])
    return y, grads[0], grads[1:]


def move(model, g):
    """Take a PEFT model away from its start."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.3)


def agree(ours, theirs, read, g):
    """PEFT's tensors copied into ours: the same output, gradients and merged weight."""
    layer = theirs.base_model.model.layer
    (_, bank), trained = next(ours.pack.banks()), ours.named_parameters()
    with torch.no_grad():
        for name, value in read(layer).items():
            own = getattr(bank, name)
            own.copy_(value[tuple(slice(k) for k in own.shape[1:])])
    x = torch.randn(3, 5, bank.site.d_in, generator=g)
    y, dx, grads = outcome(ours.model, x, [getattr(bank, n) for n in bank.trained])
    leaves = [p for p in theirs.parameters() if p.requires_grad]
    y2, dx2, grads2 = outcome(theirs, x, leaves)
    torch.testing.assert_close(y, y2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, dx2, rtol=1e-5, atol=1e-5)
    kept = [p.detach().clone() for p in leaves]
    with torch.no_grad():
        for p, grad in zip(leaves, grads2, strict=True):
            p.copy_(grad)
    for name, grad in zip(bank.trained, grads, strict=True):
        torch.testing.assert_close(grad[0], read(layer)[name], rtol=1e-5, atol=1e-5, msg=name)
    assert len(trained) == len(leaves)
    for p, value in zip(leaves, kept, strict=True):
        p.data.copy_(value)
    merged = ours.merge().layer.weight
    wanted = theirs.merge_and_unload().layer.weight
    torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_same_tensors_same_output_and_gradients(case, shape):
    method, settings, config, read = CASES[case]
    config.target_modules = ["layer"]
    theirs = peft.get_peft_model(One(*shape), config)
    g = torch.Generator().manual_seed(3)
    move(theirs, g)
    ours = adapt(One(*shape), method, rank=R, alpha=ALPHA, **settings)
    assert set(next(ours.pack.banks())[1].names) == set(read(theirs.base_model.model.layer))
    agree(ours, theirs, read, g)


def test_pinned_difference_randlora_pairs_other_columns():
    """Were PEFT to pair like with like, the permutation in `randlora` above could go."""
    config = peft.RandLoraConfig(r=R, randlora_alpha=ALPHA, target_modules=["layer"])
    layer = peft.get_peft_model(One(8, 12), config).base_model.model.layer
    with torch.no_grad():
        layer.randlora_lambda["default"].uniform_(-1, 1)
        layer.randlora_gamma["default"].uniform_(-1, 1)
    A, B = layer.randlora_A["default"][:, 0], layer.randlora_B["default"]
    L, G = layer.randlora_lambda["default"].T, layer.randlora_gamma["default"]
    paper = sum(B[:, i] @ torch.diag(L[i]) @ A @ torch.diag(G[i]) for i in range(len(L)))
    found = layer.get_delta_weight("default") / (ALPHA / R)
    assert (found - paper).norm() > 0.1 * paper.norm()


def test_pinned_difference_loha_zero_factor():
    layer = peft.get_peft_model(
        One(8, 12), peft.LoHaConfig(r=R, target_modules=["layer"])
    ).base_model.model.layer
    ours = next(adapt(One(8, 12), "loha", rank=R).pack.banks())[1]
    assert not layer.hada_w2_b["default"].any() and layer.hada_w2_a["default"].any()
    assert not ours.B2.any() and ours.A2.any()
