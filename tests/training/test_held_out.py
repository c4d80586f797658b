"""Users' own loops train as the packed one, with held-out data and with ranks that change."""

import pytest
import torch

from loralab.core.adapter import adapt
from loralab.errors import UserError
from loralab.methods import all_methods
from loralab.testing.toy import RANK, TARGETS, ToyModel, ToyTask, toy_loss, toy_trial, train
from loralab.training.schedule import DataOrder

SIZE, STEPS, LR = 4, 12, 1e-2
# A round of ALoRA costs two losses per rank; what AutoLoRA has learnt goes when its search ends.
SETTINGS = {"alora": {"rounds": 1}, "autolora": {"search": 0.99}}
NAMES = [
    name
    for name, method in all_methods().items()
    if method.recipe.rule.held_out or method.recipe.schedule.held_out
]
RESIZED = [
    name
    for name, method in all_methods().items()
    if method.recipe.schedule.resizes and not method.recipe.start.needs and name not in NAMES
]


def own_loop(method):
    """Train as a user would, on the batches that a study takes."""
    task, model = ToyTask(), ToyModel()
    adapter = adapt(model, method, rank=RANK, targets=TARGETS, **SETTINGS.get(method, {}))
    held = list(range(4, task.size("train"), 5))  # every fifth item
    rest = [i for i in range(task.size("train")) if i not in held or method not in NAMES]
    trained, tested = (DataOrder(0, task.size("train"), SIZE, items) for items in (rest, held))
    step = 0

    def loss(order):
        return toy_loss(model, task.batch("train", order.indices(step)))

    optimizer = adapter.optimizer(LR, n_steps=STEPS, held_out=lambda: loss(tested))

    def closure():
        optimizer.zero_grad()
        value, penalty = loss(trained), adapter.penalty()
        (value if penalty is None else value + penalty).backward()
        return value

    for step in range(STEPS):
        adapter.pack.layout.step = step  # random draws as in a study
        optimizer.step(closure)
    return adapter


@pytest.mark.parametrize("method", [*NAMES, *RESIZED])
def test_an_own_loop_trains_as_the_packed_one(method):
    alike = {"lr": LR, "batch_size": SIZE, "clip": 0.0, "schedule": "constant", "warmup": 0.0}
    trial = toy_trial(method, STEPS, settings=SETTINGS.get(method, {}), **alike)
    packed, own = train([trial]).pack.trainable(), own_loop(method).named_parameters()
    assert {"autolora", "bilora", "alora"} <= set(NAMES)
    assert own.keys() == packed.keys()
    for name, value in own.items():
        torch.testing.assert_close(value, packed[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["autolora", "bilora"])
def test_a_step_through_the_training_data_needs_a_closure(method):
    model = ToyModel()
    adapter = adapt(model, method, rank=RANK, targets=TARGETS)
    batch = ToyTask().batch("train", range(8))
    optimizer = adapter.optimizer(LR, n_steps=STEPS, held_out=lambda: toy_loss(model, batch))
    toy_loss(model, batch).backward()
    with pytest.raises(UserError, match=r"call optimizer.step\(closure\), .* order='first'"):
        optimizer.step()


def test_whatever_fails_in_a_step_leaves_the_adapter_as_it_was():
    model, calls = ToyModel(), 0
    adapter = adapt(model, "bilora", rank=RANK, targets=TARGETS)
    batch = ToyTask().batch("train", range(8))
    optimizer = adapter.optimizer(LR, held_out=lambda: toy_loss(model, batch))
    before = {n: p.detach().clone() for n, p in adapter.named_parameters().items()}
    gradients = {}

    def closure():
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of memory")
        optimizer.zero_grad()
        toy_loss(model, batch).backward()
        if calls == 1:
            gradients.update({n: p.grad for n, p in adapter.named_parameters().items()})

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    for name, p in adapter.named_parameters().items():
        assert torch.equal(p, before[name]) and p.grad is gradients[name], name


def test_dropout_is_the_same_on_both_sides_of_the_difference():
    model, seen = ToyModel(), []
    adapter = adapt(model, "bilora", rank=RANK, targets=TARGETS, dropout=0.5)
    batch = ToyTask().batch("train", range(8))
    optimizer = adapter.optimizer(LR, held_out=lambda: toy_loss(model, batch))

    def closure():
        optimizer.zero_grad()
        seen.append(torch.random.get_rng_state())
        toy_loss(model, batch).backward()

    optimizer.step(closure)
    assert len(seen) == 3 and torch.equal(seen[1], seen[2]) and not torch.equal(seen[0], seen[1])


def test_nothing_is_held_out_after_the_search():
    model, asked = ToyModel(), 0
    adapter = adapt(model, "autolora", rank=RANK, targets=TARGETS, order="first", search=0.25)
    batch = ToyTask().batch("train", range(8))

    def held_out():
        nonlocal asked
        asked += 1
        return toy_loss(model, batch)

    optimizer = adapter.optimizer(LR, n_steps=STEPS, held_out=held_out)
    for _ in range(STEPS):
        optimizer.zero_grad()
        toy_loss(model, batch).backward()
        optimizer.step()
    assert asked == STEPS // 4


def test_the_upper_level_follows_held_out_data_alone():
    model = ToyModel()
    adapter = adapt(model, "bilora", rank=RANK, targets=TARGETS, order="first")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
    optimizer = adapter.optimizer(LR, held_out=lambda: 0.0 * model(ToyTask().x).sum())
    before = {n: p.detach().clone() for n, p in adapter.named_parameters().items()}
    toy_loss(model, ToyTask().batch("train", range(8))).backward()
    optimizer.step()
    for name, p in adapter.named_parameters().items():
        assert torch.equal(p, before[name]) == name.endswith("Lambda"), name


@pytest.mark.parametrize("method", NAMES)
def test_no_held_out_data_gets_one_sentence(method):
    adapter = adapt(ToyModel(), method, rank=2, targets=TARGETS)
    with pytest.raises(UserError, match="looks at held-out data; pass held_out=, a function"):
        adapter.optimizer(LR, n_steps=STEPS)


@pytest.mark.parametrize(
    ("found", "words"), [(3.0, "not float"), (torch.ones(2), r"not \(2,\)")], ids=["float", "row"]
)
def test_held_out_must_return_a_loss(found, words):
    adapter = adapt(ToyModel(), "bilora", rank=2, targets=TARGETS, order="first")
    optimizer = adapter.optimizer(LR, held_out=lambda: found)
    with pytest.raises(UserError, match=words):
        optimizer.step()


def test_a_closure_or_a_held_out_loss_without_gradients_is_refused():
    model, batch = ToyModel(), ToyTask().batch("train", range(8))
    adapter = adapt(model, "bilora", rank=RANK, targets=TARGETS)

    def closure():
        toy_loss(model, batch).backward()

    with pytest.raises(UserError, match="held_out is a function"):
        adapter.optimizer(LR, held_out=3.0)
    optimizer = adapter.optimizer(LR, held_out=lambda: toy_loss(model, batch))
    with pytest.raises(UserError, match="closure gave no trained tensor a gradient"):
        optimizer.step(lambda: toy_loss(model, batch))
    optimizer = adapter.optimizer(LR, held_out=lambda: toy_loss(model, batch).detach())
    with pytest.raises(UserError, match="no gradient can be taken"):
        optimizer.step(closure)


@pytest.mark.parametrize(("method", "rank"), [("lora", RANK + 1), ("lora_fa", RANK)])
def test_the_memory_of_another_adapter_is_refused(method, rank):
    model, batch = ToyModel(), ToyTask().batch("train", range(8))
    adapter = adapt(model, method, rank=rank, targets=TARGETS)
    optimizer = adapter.optimizer(LR)
    toy_loss(model, batch).backward()
    optimizer.step()
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    other = adapt(ToyModel(), "lora", rank=RANK, targets=TARGETS).optimizer(LR)
    with pytest.raises(UserError, match="of another adapter"):
        other.load_state_dict(saved)
