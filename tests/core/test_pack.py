"""What the conformance suite does not ask: mixed packs, whole modules, dropout, dtypes, ties."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import loralab
from loralab import adapt
from loralab.core.evidence import measure
from loralab.core.pack import Pack, SlotSpec
from loralab.core.sites import LinearSite
from loralab.errors import UserError
from loralab.methods import build
from loralab.seeds import generator
from loralab.testing.toy import TARGETS, ToyModel, ToyTask, toy_loss


def llama(dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).to(dtype).eval()


def tokens(rows: int, length: int = 6) -> torch.Tensor:
    return torch.randint(0, 24, (rows, length), generator=generator("tokens", rows, length))


def disturb(pack: Pack) -> None:
    """Move every trained tensor away from its start, the same way for a slot wherever it sits."""
    with torch.no_grad():
        for name, site in zip(pack.names, pack.sites, strict=True):
            for lo, bank in zip(site.first, site.banks, strict=True):
                for t in bank.trained:
                    value = getattr(bank, t)
                    for k in range(bank.size):
                        stream = generator(pack.slots[lo + k].seed, name, t)
                        value[k] += 0.1 * torch.randn(value[k].shape, generator=stream).to(value)


MIXED = [
    SlotSpec(build("lora"), rank=2, seed=0),
    SlotSpec(build("lora"), rank=2, seed=1, alpha=8.0),
    SlotSpec(build("pissa"), rank=3, seed=2, targets=("q_proj", "down_proj")),
    SlotSpec(build("dora"), rank=2, seed=3, modules_to_train=("lm_head",)),
    SlotSpec(build("vera"), rank=4, seed=4, rank_pattern={"v_proj": 2}),
    SlotSpec(build("hydralora"), rank=2, seed=5, modules_to_train=("norm", "lm_head")),
]
ROWS = [2, 1, 3, 2, 1, 2]


def alone(spec: SlotSpec, ids: torch.Tensor) -> torch.Tensor:
    model = llama()
    pack = Pack(model, [spec])
    disturb(pack)
    return model(ids).logits


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 3, 1, 4, 2, 0], [2, 4]])
def test_slots_of_any_kind_and_row_count_equal_each_alone(order):
    model, ids = llama(), tokens(sum(ROWS)).split(ROWS)
    pack = Pack(model, [MIXED[i] for i in order])
    disturb(pack)
    with pack.rows([ROWS[i] for i in order]):
        out = model(torch.cat([ids[i] for i in order])).logits
    for part, i in zip(out.split([ROWS[i] for i in order]), order, strict=True):
        torch.testing.assert_close(part, alone(MIXED[i], ids[i]), rtol=1e-5, atol=1e-6)


def test_dropping_slots_leaves_the_others_as_they_were():
    model, ids = llama(), tokens(sum(ROWS)).split(ROWS)
    pack = Pack(model, MIXED)
    disturb(pack)
    stay = [1, 3, 4, 5]
    pack.keep(stay)
    assert pack.count_parameters() == [
        Pack(llama(), [MIXED[i]]).count_parameters()[0] for i in stay
    ]
    with pack.rows([ROWS[i] for i in stay]):
        out = model(torch.cat([ids[i] for i in stay])).logits
    for part, i in zip(out.split([ROWS[i] for i in stay]), stay, strict=True):
        torch.testing.assert_close(part, alone(MIXED[i], ids[i]), rtol=1e-5, atol=1e-6)


def test_a_batch_that_cannot_be_shared_is_refused():
    model = llama()
    pack = Pack(model, MIXED[:2])
    with pytest.raises(UserError, match="a batch of 3 rows cannot be shared by 2 slots"):
        model(tokens(3))
    with pytest.raises(UserError, match="3 row counts for 2 slots"), pack.rows([1, 1, 1]):
        pass


def gpt2(dtype: torch.dtype) -> nn.Module:
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=24)
    return GPT2LMHeadModel(config).to(dtype)


@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_fused_path_equals_the_plain_one_to_the_second_derivative(monkeypatch, method, make):
    """Values, gradients and Hessian-vector products, with and without biases (GPT-2)."""
    torch.manual_seed(0)
    model = make(torch.float64).eval()
    adapter = loralab.adapt(model, method, rank=2)
    disturb(adapter.pack)
    ids, found = tokens(2), []
    for fusible in (LinearSite._fusible, lambda *_: False):
        monkeypatch.setattr(LinearSite, "_fusible", fusible)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = model(ids, labels=ids).loss
        g = torch.autograd.grad(loss, adapter.parameters(), create_graph=True)
        dot = sum((x * torch.cos(torch.arange(x.numel())).view_as(x)).sum() for x in g)
        found.append([loss, *g, *torch.autograd.grad(dot, adapter.parameters())])
    for a, b in zip(*found, strict=True):
        # RMSNorm and the loss compute in fp32 even here.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7 * b.abs().max().item())


def test_layers_that_read_the_same_input_keep_it_once():
    model = nn.ModuleDict({n: nn.Linear(32, 8, bias=False) for n in "qkv"})
    pack = Pack(model, [SlotSpec(build("lora"), rank=2)])
    kept: dict[int, int] = {}

    def hook(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    for dtype, autocast in ((torch.float32, False), (torch.bfloat16, True)):
        kept.clear()
        x = torch.randn(64, 32, requires_grad=True)
        with saved_tensors_hooks(hook, lambda t: t), torch.autocast("cpu", dtype, enabled=autocast):
            sum(m(x).float().sum() for m in model.values()).backward()
        size = 64 * 32 * (2 if autocast else 4)
        assert sum(n == size for n in kept.values()) == 1
    pack.close()


def test_bf16_base_keeps_fp32_adapters_and_its_own_output_dtype():
    model = llama(torch.bfloat16)
    adapter = loralab.adapt(model, "lora", rank=2)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    loss = model(tokens(2), labels=tokens(2)).loss
    loss.backward()
    assert model(tokens(2)).logits.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


def test_dropout_draws_by_seed_site_and_step_whoever_is_in_the_pack():
    def out(specs: list[SlotSpec], step: int) -> torch.Tensor:
        model = llama()
        pack = Pack(model, specs)
        disturb(pack)
        pack.layout.step = step
        model.train()
        with pack.rows([2] * len(specs)):
            return model(tokens(2).repeat(len(specs), 1)).logits

    specs = [SlotSpec(build("lora"), rank=2, seed=s, dropout=0.5) for s in (7, 8)]
    both, swapped = out(specs, 3), out(specs[::-1], 3)
    torch.testing.assert_close(both[:2], swapped[2:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both[2:], out(specs[1:], 3), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(out(specs[:1], 3), out(specs[:1], 4))


def test_tied_twin_keeps_the_base_weight_when_the_head_is_merged():
    model = llama(tie_word_embeddings=True)
    ids, embedding = tokens(2), model.model.embed_tokens.weight.detach().clone()
    adapter = loralab.adapt(model, "lora", rank=2, targets=["lm_head", "q_proj"])
    disturb(adapter.pack)
    wanted = model(ids).logits
    merged = adapter.merge()
    torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert not model.config.tie_word_embeddings
    adapter.remove()
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_pack_shares_one_calibration_pass():
    """Gradients and both covariances of all layers, whoever asks for which, ranks chosen or not."""
    calls = []

    def source(names, needs):
        calls.append(set(needs))
        batch = ToyTask().batch("train", range(8))
        return measure(ToyModel(), names, needs, [batch], toy_loss)

    methods = ("eva", "gora", "lora_ga", "corda", "lora_da", "lora")
    slots = [
        SlotSpec(build(name), rank=3, seed=seed, targets=TARGETS)
        for seed in (0, 1)
        for name in methods
    ]
    Pack(ToyModel(), slots, source)
    assert calls == [{"gradient", "covariance", "gradient_covariance"}]


def test_under_autocast_layers_that_read_parts_of_one_tensor_get_their_own():
    """A cast is shared by layers that read the same x; halves and later values are others."""

    class Parts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x):
            first, second = x.chunk(2, 0)
            y = [self.a(first), self.b(second), self.a(x[0]), self.a(x[1])]
            x.mul_(-2)
            return torch.cat([*(v.flatten() for v in y), self.a(x[1]).flatten()])

    torch.manual_seed(0)
    model, x = Parts(), torch.randn(4, 3, 8)
    adapter = adapt(model, "lora", rank=2)
    for p in adapter.parameters():
        torch.nn.init.normal_(p)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x.clone())
        wanted = adapter.merge()(x.clone())
    assert (found - wanted).float().norm() < 0.02 * wanted.float().norm()


def test_gradient_checkpointing_and_copies_work():
    model = llama()
    adapter = loralab.adapt(model, "dora", rank=2)
    ids = tokens(2)
    model.train()
    model(ids, labels=ids).loss.backward()
    wanted = [p.grad.clone() for p in adapter.parameters()]
    for p in adapter.parameters():
        p.grad = None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(ids, labels=ids).loss.backward()
    for p, g in zip(adapter.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(ids).logits, model(ids).logits)


def test_the_optimizer_resumes_from_its_state_and_drives_schedules():
    def run(stop_at: int | None) -> list[torch.Tensor]:
        model, ids = llama(), tokens(4)
        adapter = loralab.adapt(model, "adalora", rank=2)
        optimizer = adapter.optimizer(lr=1e-2, n_steps=12)
        for step in range(12):
            if step == stop_at:
                state = optimizer.state_dict()
                optimizer = adapter.optimizer(lr=1.0, n_steps=12)
                optimizer.load_state_dict(state)
            (model(ids, labels=ids).loss + adapter.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in adapter.parameters()]

    for a, b in zip(run(None), run(5), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.0}, "learning rate must be positive"),
        ({"lr": 1e-3, "weight_decay": -1.0}, "weight_decay must not be negative"),
        ({"lr": 1e-3}, "pass n_steps="),
        ({"lr": "1e-3"}, "the learning rate must be a number, not '1e-3'"),
        ({"lr": 1e-3, "n_steps": 0}, "n_steps counts the planned steps"),
    ],
)
def test_wrong_optimizer_requests_get_one_sentence(options, words):
    adapter = loralab.adapt(llama(), "adalora", rank=2)
    with pytest.raises(UserError, match=words):
        adapter.optimizer(**options)


def test_starts_that_need_data_say_so_and_take_it():
    with pytest.raises(UserError, match="pass data="):
        loralab.adapt(llama(), "lora_ga", rank=2)
    with pytest.raises(UserError, match="no batch"):
        loralab.adapt(llama(), "lora_ga", rank=2, data=[])
    model, ids = llama(), tokens(4)
    before = model(ids).logits
    loralab.adapt(model, "lora_ga", rank=2, data=[{"input_ids": ids, "labels": ids}])
    assert torch.equal(model(ids).logits, before)


def test_hugging_face_trainer_trains_it(tmp_path):
    from transformers import Trainer, TrainingArguments

    model, ids = llama(), tokens(16)
    adapter = loralab.adapt(model, "pissa", rank=2)
    rows = [{"input_ids": r, "labels": r} for r in ids]
    arguments = TrainingArguments(
        tmp_path, max_steps=40, per_device_train_batch_size=8, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    before = model(ids, labels=ids).loss.item()
    optimizer = adapter.optimizer(lr=2e-2)
    Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    assert model(ids, labels=ids).loss.item() < before - 0.05


@pytest.mark.parametrize(
    ("method", "setting", "words"),
    [
        ("lora", {"beta1": 2.0}, r"beta1 of AdamW must be in \[0, 1\), not 2.0"),
        ("lora_plus", {"beta2": -0.1}, "beta2 of LoRAPlus"),
        ("lora_fa", {"eps": 0.0}, "eps of FrozenA must be positive"),
        ("loft", {"beta1": 1.0}, "beta1 of LoFT"),
        ("adalora", {"growth": 0.5}, "growth of AdaSVD must be at least 1, not 0.5"),
        ("adalora", {"t_final": 0.9}, "leave room between them"),
    ],
)
def test_hyper_parameters_out_of_range_get_one_sentence(method, setting, words):
    with pytest.raises(UserError, match=words):
        build(method, **setting)


@pytest.mark.parametrize("method", ["gralora", "moelora", "full"])
def test_a_pack_of_one_recipe_is_not_sliced(method):
    """A slice of all rows is not, but its gradient is a copy of them."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    adapter = adapt(model, method, rank=4, targets=("0", "2"))
    losses = [model(torch.randn(6, 8)), adapter.penalty()]
    todo, found = [loss.grad_fn for loss in losses if loss is not None], set()
    while todo:
        node = todo.pop()
        if node is not None:
            found.add(node.name())
            todo += [n for n, _ in node.next_functions]
    assert not {name for name in found if name.startswith("Slice")}
