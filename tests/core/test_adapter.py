"""What the conformance suite does not ask of one adapter: odd inputs, odd models, odd orders."""

import copy
import warnings

import pytest
import torch
from torch import nn

import loralab
from loralab.core.pack import Pack, SlotSpec
from loralab.errors import UserError
from loralab.methods import build


class Net(nn.Module):
    """Three layers, one of which the loss never reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.idle = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(input=torch.tanh(self.up(x)))


def disturb(adapter: loralab.Adapter, size: float = 0.3) -> None:
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size)


X = torch.linspace(-1, 1, 5 * 16).view(5, 16)


def test_disable_runs_the_base_while_merged_and_stays_merged():
    model = Net()
    base = model(X)
    adapter = loralab.adapt(model, "dora", rank=2)
    disturb(adapter)
    merged = adapter.merge()(X)
    with adapter.disable():
        assert torch.equal(model(X), base)
    assert torch.equal(model(X), merged)
    assert not torch.equal(merged, base)


def test_a_second_adapter_on_a_merged_model_blocks_the_first_ones_return():
    model = Net()
    first = loralab.adapt(model, "lora", rank=2)
    disturb(first)
    first.merge()
    second = loralab.adapt(model, "lora", rank=2)
    merged = model(X)
    with pytest.raises(UserError, match="already carries an adapter"):
        first.unmerge()
    assert torch.equal(model(X), merged)
    second.remove()
    first.remove()
    with pytest.raises(UserError, match="was removed"):
        first.merge()


@pytest.mark.parametrize("masked", [False, True])
def test_transformer_encoder_layers_cannot_bypass_the_adapter_in_evaluation(masked):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.linspace(-1, 1, 160).view(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = masked
    padding = mask if masked else None
    before = [len(m._forward_pre_hooks) for m in model.modules()]
    adapter = loralab.adapt(model, "lora", rank=2)
    disturb(adapter)
    with torch.no_grad():
        found = model(x, src_key_padding_mask=padding)
        merged = adapter.merge().train()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~mask], merged[~mask], atol=1e-5, rtol=1e-5)
    adapter.remove()
    assert [len(m._forward_pre_hooks) for m in model.modules()] == before


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "gralora", "hydralora"])
@pytest.mark.parametrize("shape", [(0, 16), (0, 3, 16), (3, 0, 16), (16,), (2, 3, 4, 16)])
def test_inputs_of_any_shape_pass(method, shape):
    model = Net()
    loralab.adapt(model, method, rank=2, modules_to_train="down")
    out = model(torch.zeros(shape))
    assert out.shape == shape
    out.sum().backward()


def test_randlora_takes_ranks_that_do_not_divide_each_other():
    model = Net()
    adapter = loralab.adapt(model, "randlora", rank=4, rank_pattern={"up": 3, "idle": 5})
    disturb(adapter)
    found = model(X)
    torch.testing.assert_close(adapter.merge()(X), found, atol=1e-3, rtol=1e-5)


def test_a_layer_that_the_loss_does_not_reach_is_named():
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    with pytest.raises(UserError, match="'idle' plays no part in the loss"):
        loralab.adapt(Net(), "lora_ga", rank=2, data=[X], loss=loss)
    loralab.adapt(Net(), "lora_ga", rank=2, data=[X], loss=loss, targets=["up", "down"])
    with pytest.raises(UserError, match="a data batch is a mapping or a tuple"):
        loralab.adapt(Net(), "lora_ga", rank=2, data=[X])


def test_modules_trained_whole_keep_small_steps_of_a_bf16_model():
    model = Net().to(torch.bfloat16)
    adapter = loralab.adapt(model, "lora", rank=2, modules_to_train="down")
    weight = adapter.named_parameters()["down.weight"]
    start = weight.detach().clone()
    optimizer = adapter.optimizer(1e-5)
    for _ in range(3):
        model(X.bfloat16()).float().square().mean().backward()
        optimizer.step()
    assert ((weight - start).abs() > 1e-5).float().mean() > 0.9
    assert model(X.bfloat16()).dtype == torch.bfloat16


class Mask(nn.Module):
    """A module with parameters of its own and two inputs, one by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor, *, shift: float = 0.0) -> torch.Tensor:
        return x * self.weight + shift


class WithMask(Net):
    """Calls such a module first."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = Mask()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.mask(x, shift=1.0))


def test_whole_modules_may_take_several_inputs_in_a_pack_of_one():
    model = WithMask()
    base = model(X)
    loralab.adapt(model, "lora", rank=2, modules_to_train=["mask"])
    assert torch.equal(model(X), base)
    slots = [SlotSpec(build("lora"), rank=2, modules_to_train=("mask",))] * 2
    pack = Pack(WithMask(), slots)
    with pytest.raises(UserError, match="Mask takes 2 inputs"), pack.rows([2, 3]):
        pack.model(X)


def test_a_pack_mate_cannot_take_a_layer_away():
    slots = [
        SlotSpec(build("lora"), rank=2, targets=("up", "down")),
        SlotSpec(build("lora"), rank=2, targets=("up",), modules_to_train=("down",)),
    ]
    with pytest.raises(UserError, match="slot 0 adapts layer 'down', which slot 1"):
        Pack(Net(), slots)


def test_attention_projections_are_not_trained_in_vain():
    with pytest.raises(UserError, match="reads without calling it"):
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        loralab.adapt(layer, "lora", rank=2, modules_to_train="out_proj")


def test_copies_are_independent():
    model = Net()
    adapter = loralab.adapt(model, "vera", rank=2)
    twin = copy.deepcopy(adapter)
    before = twin.model(X)
    disturb(adapter)
    assert torch.equal(twin.model(X), before)
    assert not torch.equal(model(X), before)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 2.5}, "rank must be a whole number"),
        ({"rank": "8"}, "rank must be a whole number"),
        ({"rank_pattern": {"up": 0}}, "rank must be at least 1"),
        ({"rank_pattern": 5}, "rank_pattern maps names"),
        ({"alpha": "x"}, "alpha must be a positive number"),
        ({"alpha": 0}, "alpha must be a positive number"),
        ({"alpha_pattern": {"up": float("nan")}}, "alpha must be a positive number"),
        ({"alpha": -4.0, "init": "pissa"}, "alpha must be a positive number"),
        ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"seed": None}, "seed must be a whole number, not None"),
        ({"init": "pissa", "start": "olora"}, "init and start are two words for one piece"),
        ({"lora_alpha": 16}, "PEFT's lora_alpha is called alpha here"),
        ({"dropout": "much"}, "dropout must lie in"),
        ({"targets": None}, "targets are names of layers"),
        ({"targets": [1]}, "targets are names of layers"),
        ({"modules_to_train": 5}, "modules_to_train are names"),
        ({"eps": None}, "'eps' of method 'lora' is a float"),
        ({"form": "gralora", "k": 0}, "k of GraLoRA must be a whole number from 1 on, not 0"),
        ({"form": "hydralora", "n_heads": 0}, "n_heads of HydraLoRA must be a whole number from 1"),
    ],
)
def test_values_of_the_wrong_kind_are_told_in_one_sentence(settings, said):
    with pytest.raises(UserError, match=said):
        loralab.adapt(Net(), "lora", **{"rank": 2} | settings)


def test_nothing_is_trained_while_merged():
    adapter = loralab.adapt(Net(), "lora", rank=2)
    optimizer = adapter.optimizer(1e-2)
    adapter.merge()
    with pytest.raises(UserError, match="merged or removed"):
        optimizer.step()


@pytest.mark.parametrize("method", ["hra", "adalora", "lora_moe"])
def test_a_loss_of_the_method_s_own_that_nobody_adds_is_warned_of_once(method):
    for asked in (False, True):
        settings = {"lam": 1.0} if method == "hra" else {}
        adapter = loralab.adapt(Net(), method, rank=2, **settings)
        optimizer = adapter.optimizer(1e-2, n_steps=3)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                loss = adapter.model(X).square().mean()
                (loss + adapter.penalty() if asked else loss).backward()
                optimizer.step()
        assert [str(w.message)[:27] for w in seen] == ["the method has a loss of it"] * (not asked)


def test_only_modules_are_adapted_and_only_by_name():
    with pytest.raises(UserError, match=r"takes an nn\.Module, not a int"):
        loralab.adapt(5)
    with pytest.raises(UserError, match="called by name"):
        loralab.adapt(Net(), 5)


def test_layers_of_peft_are_no_base():
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    for given in (theirs, model):  # PEFT has changed the layers in place
        with pytest.raises(UserError, match=r"adapter of PEFT's.*merge_and_unload"):
            loralab.adapt(given, "lora", rank=2)
    loralab.adapt(theirs.merge_and_unload(), "lora", rank=2)


@pytest.mark.parametrize("targets", ["0", ["0", "1"], "all-linear"])
def test_a_layer_is_adapted_or_trained_whole(targets):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    whole = ["0", "1"] if targets == "all-linear" else "0"
    with pytest.raises(UserError, match="'0' is in targets and in modules_to_train"):
        loralab.adapt(model, "lora", rank=2, targets=targets, modules_to_train=whole)
    loralab.adapt(model, "lora", rank=2, modules_to_train="0")


@pytest.mark.parametrize("path", [None, "", 5])
def test_a_folder_is_named_by_a_path(path):
    adapter = loralab.adapt(Net(), "lora", rank=2)
    for call in (adapter.save, adapter.export, lambda p: loralab.load(Net(), p)):
        with pytest.raises(UserError, match="folder is named by a path"):
            call(path)


def test_models_are_modules(tmp_path):
    for call in (
        lambda: loralab.load("x", tmp_path),
        lambda: loralab.curvature("x", "lora", [{}]),
        lambda: loralab.quantize("x", "nf4"),
    ):
        with pytest.raises(UserError, match=r"an nn\.Module.* not 'x'"):
            call()
    with pytest.raises(UserError, match="unknown code 5"):
        loralab.quantize(Net(), 5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data": 5}, "pass a list of batches"),
        ({"data": {"x": X}}, "pass a list of batches"),
        ({"loss": 5}, r"loss is a function of \(model, batch\), not 5"),
        ({"loss": lambda m, b: 5.0}, "a tensor of one number, not float"),
        ({"loss": lambda m, b: m(b)}, r"a tensor of one number, not \["),
        ({"loss": lambda m, b: m(b).sum().detach()}, "no gradient can be taken"),
    ],
)
def test_data_are_batches_and_a_loss_is_a_scalar(settings, said):
    with pytest.raises(UserError, match=said):
        loralab.adapt(Net(), "lora_ga", **{"rank": 2, "data": [X]} | settings)
