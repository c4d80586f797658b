"""Curvature against dense Hessians in fp64."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import loralab
from loralab.core.pack import Pack, SlotSpec
from loralab.curvature.blocks import block_tensors, choose_blocks, flat
from loralab.curvature.cheap import default_losses, gradients, sampled_labels
from loralab.curvature.hessian import PackedHessian, differentiable_twice
from loralab.curvature.lanczos import lanczos
from loralab.errors import UserError
from loralab.methods import build
from loralab.seeds import generator

STARTS = ["lora", "pissa", "olora", "dora", "vera", "loha"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    stream = generator("curvature test")
    ids = torch.randint(0, 24, (4, 7), generator=stream)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, :5] = -100
    return {"input_ids": ids, "labels": labels}


def dense_hessian(model: nn.Module, batch: dict, method: str, block_name: str) -> torch.Tensor:
    """Return the Hessian of one block by differentiating every entry of the gradient."""
    pack = Pack(model, [SlotSpec(build(method), rank=2)])
    (block,) = choose_blocks(pack, block_name)
    tensors = block_tensors(pack, block)
    try:
        with differentiable_twice(model):
            sums, counts = default_losses(model, batch)
            loss = sums.sum() / counts.sum()
            g = flat(torch.autograd.grad(loss, tensors, create_graph=True), 0)
            rows = [
                flat(torch.autograd.grad(e, tensors, retain_graph=True, allow_unused=False), 0)
                for e in g
            ]
    finally:
        pack.close()
    return torch.stack(rows)


@pytest.mark.parametrize("method", STARTS)
def test_exact_ends_equal_the_dense_hessians(model, batch, method):
    names = ["q_proj", "down_proj"]
    found = loralab.curvature(
        model, method, [batch], rank=2, blocks=",".join(names), rtol=1e-8, max_products=500, pack=2
    )
    for block, name in zip(found.blocks, names, strict=True):
        values = torch.linalg.eigvalsh(dense_hessian(model, batch, method, name))
        assert block.lambda_max == pytest.approx(values[-1].item(), rel=1e-6)
        assert block.lambda_min == pytest.approx(values[0].item(), rel=1e-6)


def test_the_residual_bounds_the_error(model, batch):
    found = loralab.curvature(model, "pissa", [batch], rank=2, blocks="v_proj", rtol=0.05)
    (block,) = found.blocks
    values = torch.linalg.eigvalsh(dense_hessian(model, batch, "pissa", "v_proj"))
    assert abs(values - block.lambda_max).min() <= block.residual + 1e-9
    assert block.residual <= 0.05 * max(abs(block.lambda_max), abs(block.lambda_min))


def test_packed_products_equal_one_block_at_a_time(model, batch):
    vectors = {}
    pack = Pack(model, [SlotSpec(build("pissa"), rank=2)] * 3)
    blocks = choose_blocks(pack, "q_proj,o_proj,up_proj")
    for slot, block in enumerate(blocks):
        like = flat(block_tensors(pack, block), slot)
        draw = torch.randn(like.numel(), generator=generator("v", slot), dtype=like.dtype)
        vectors[slot] = (block, draw)
    with differentiable_twice(model):
        together = PackedHessian(pack, [batch], default_losses).products(vectors)
    pack.close()
    for slot, block in enumerate(blocks):
        dense = dense_hessian(model, batch, "pissa", block.name.rsplit(".", 1)[-1])
        wanted = dense @ vectors[slot][1]
        # Llama's RMSNorm computes in fp32 even in an fp64 model, hence not 1e-12.
        assert (together[slot] - wanted).norm() < 1e-5 * wanted.norm()


def test_splitting_the_data_into_batches_changes_nothing(model, batch):
    halves = [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}]
    for way in ("exact", "closed_form"):
        options = dict(rank=2, blocks="q_proj", way=way, rtol=1e-8, max_products=300)
        whole = loralab.curvature(model, "lora", [batch], **options)
        parts = loralab.curvature(model, "lora", halves, **options)
        assert parts.lambda_max == pytest.approx(whole.lambda_max, rel=1e-6)


def test_closed_form_is_the_coupling_of_the_dense_hessian(model, batch):
    """With the curvature term removed, the dense block's ends are +-s sigma_max(G)."""
    found = loralab.curvature(model, "lora", [batch], rank=2, blocks="q_proj", way="closed_form")
    H = dense_hessian(model, batch, "lora", "q_proj")
    n_A = 2 * 16
    H[:n_A, :n_A] = 0
    H[n_A:, n_A:] = 0  # what is left at B = 0 is the A-B block, which is the coupling alone
    assert found.lambda_max == pytest.approx(torch.linalg.eigvalsh(H)[-1].item(), rel=1e-8)


def test_gauss_newton_plus_coupling_converges_to_its_expectation(model, batch):
    """Against C^T C + coupling with the exact Gauss-Newton matrix of a one-layer softmax model."""
    torch.manual_seed(1)
    linear = nn.Sequential(nn.Linear(6, 5, bias=False)).double()

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = linear

        def forward(self, x):
            return type("Out", (), {"logits": self.body(x)})

    net, stream = Classifier(), generator("gn")
    data = {
        "x": torch.randn(64, 6, generator=stream, dtype=torch.float64),
        "labels": torch.randint(0, 5, (64,), generator=stream),
    }
    options = dict(rank=2, targets="body.0", blocks="all", rtol=1e-8, max_products=400)
    exact = loralab.curvature(net, "pissa", [data], **options)
    estimate = loralab.curvature(
        net, "pissa", [data], way="gauss_newton", draws=60, pack=16, **options
    )
    # A linear model has no curvature beyond Gauss-Newton and the coupling: both ways agree.
    assert estimate.lambda_max == pytest.approx(exact.lambda_max, rel=0.1)
    assert estimate.lambda_min == pytest.approx(exact.lambda_min, rel=0.15)


def test_sampled_labels_follow_the_prediction_and_keep_what_does_not_count(model, batch):
    many = {k: v[:1].repeat(4000, 1) for k, v in batch.items()}
    drawn = sampled_labels(model, many, generator("labels"))["labels"]
    assert bool((drawn[:, :3] == -100).all())
    with torch.no_grad():
        p = model(input_ids=batch["input_ids"][:1]).logits[0, 3].softmax(-1)
    share = torch.bincount(drawn[:, 4], minlength=24) / 4000
    assert (share - p).abs().max() < 0.03


def test_gradients_equal_autograd(model, batch):
    name = "model.layers.0.mlp.down_proj"
    G = gradients(model, [name], [batch], default_losses)[name]
    weight = model.get_submodule(name).weight
    sums, counts = default_losses(model, batch)
    (wanted,) = torch.autograd.grad(sums.sum() / counts.sum(), [weight])
    torch.testing.assert_close(G, wanted)


def test_lanczos_finds_both_ends_of_an_indefinite_matrix():
    stream = generator("lanczos")
    Q = torch.linalg.qr(torch.randn(80, 80, generator=stream, dtype=torch.float64)).Q
    values = torch.linspace(-3, 5, 80, dtype=torch.float64)
    H = Q @ torch.diag(values) @ Q.mT
    found = lanczos(
        lambda v: H @ v, torch.randn(80, generator=stream, dtype=torch.float64), 1e-6, 80
    )
    assert (found.lambda_max, found.lambda_min) == pytest.approx((5, -3), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"way": "exakt"}, "unknown way 'exakt'; did you mean exact"),
        ({"blocks": "q_prj"}, "'q_prj' fits no adapted layer; did you mean q_proj"),
        ({"way": "closed_form", "method": "pissa"}, "holds for starts with B = 0"),
        ({"way": "gauss_newton", "method": "dora"}, "one plain trained pair"),
        ({"data": []}, "needs data"),
        ({"data": {}}, "pass a list of batches"),
        *(({"rtol": r}, "rtol must be a number above 0") for r in (float("nan"), 0, -1, 5, "x")),
    ],
)
def test_wrong_requests_get_one_sentence(model, batch, options, words):
    with pytest.raises(UserError, match=words):
        loralab.curvature(
            model, options.pop("method", "lora"), options.pop("data", [batch]), rank=2, **options
        )


def test_the_model_is_given_back_as_it_was(model, batch):
    before = [p.requires_grad for p in model.parameters()]
    loralab.curvature(model, "lora", [batch], rank=2, blocks="q_proj")
    assert [p.requires_grad for p in model.parameters()] == before
    assert not any(hasattr(m, "loralab") for m in model.modules())
