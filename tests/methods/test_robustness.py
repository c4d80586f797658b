"""Bugs planted in what the exam sees of packs, files, memory, precisions and devices are caught."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from loralab import cost, seeds, testing
from loralab.core import pack, sites
from loralab.core.bank import START, Bank
from loralab.core.coded import Coded, CodedLinear
from loralab.core.merge import Merged
from loralab.interop import placing
from loralab.methods.optimization.miss import MiSS
from loralab.testing.elsewhere import check_other_device
from loralab.testing.keeping import (
    check_cost_is_measured,
    check_keeps_nothing_large,
    check_memory_is_measured,
)
from loralab.testing.packing import check_any_slot_saves_and_loads
from loralab.testing.robustness import (
    check_bfloat16,
    check_gradient_checkpointing,
    check_quantized_bases,
    check_tied_embeddings,
)
from loralab.testing.toy import toy_trial, train
from loralab.training.adamw import AdamW
from loralab.training.optimizer import PackOptimizer
from tests.methods.test_conformance import check_another_process


def caught(check, name):
    with pytest.raises(AssertionError):
        check(name)


def test_a_dequantised_weight_that_is_kept(monkeypatch):
    check_keeps_nothing_large("lora")
    monkeypatch.setattr(Coded, "linear", lambda self, x, b=None: F.linear(x, self.read(), b))
    caught(check_keeps_nothing_large, "oft")


def test_codes_that_drift(monkeypatch):
    run = CodedLinear.forward

    def forward(self, x):
        self.absmax.mul_(1 + 1e-12)
        return run(self, x)

    monkeypatch.setattr(CodedLinear, "forward", forward)
    caught(check_quantized_bases, "lora")


def test_codes_of_eight_bits_that_drift_where_W_is_stored_transposed(monkeypatch):
    run = CodedLinear.forward

    def forward(self, x):
        if self.codes.dtype == torch.int8 and self.plain is not torch.nn.Linear:
            self.absmax.mul_(1 + 1e-12)
        return run(self, x)

    monkeypatch.setattr(CodedLinear, "forward", forward)
    caught(check_quantized_bases, "lora")


def test_draws_that_checkpointing_cannot_replay(monkeypatch):
    check_gradient_checkpointing("dylora")
    count = itertools.count()
    monkeypatch.setattr(sites, "_fresh", lambda: next(count))
    caught(check_gradient_checkpointing, "dylora")


def test_an_output_that_is_off_in_bf16_alone(monkeypatch):
    check_bfloat16("dora")
    run = Bank.fused

    def fused(self, x, weight, bias):
        return run(self, x, weight, bias) * (1.1 if x.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(Bank, "fused", fused)
    caught(check_bfloat16, "dora")


def test_a_merge_that_writes_into_a_tied_weight(monkeypatch):
    init = Merged.__init__

    def merged(self, pack):
        init(self, pack)
        for module, name, old in self._aside:
            old.data.copy_(module._parameters[name])

    monkeypatch.setattr(Merged, "__init__", merged)
    caught(check_tied_embeddings, "lora")


def test_numbers_that_show_gets_wrong(monkeypatch):
    told = cost.measure(testing.keeping.build("vera"))
    monkeypatch.setattr(cost, "measure", lambda _: cost.Cost({}, {}, told.n_trained + 1, 0))
    caught(check_cost_is_measured, "vera")


def hidden_copies(self, sites, hyper, _original=AdamW.step):
    """A Rule that remembers something past `SiteState.state`."""
    _original(self, sites, hyper)
    for site in sites:
        site.aside = {n: t.clone() for n, t in site.t.items()}


@pytest.mark.parametrize(
    ("cls", "attribute", "mutant"),
    [(PackOptimizer, "tensors", lambda self: {}), (AdamW, "step", hidden_copies)],
    ids=["cost forgets the rule", "the rule hides"],
)
def test_memory_that_is_not_told(cls, attribute, mutant, monkeypatch):
    cost.memory.cache_clear()
    check_memory_is_measured("lora_fa")
    cost.memory.cache_clear()
    monkeypatch.setattr(cls, attribute, mutant)
    caught(check_memory_is_measured, "lora_fa")
    cost.memory.cache_clear()


def first_slot_s_start(self, lo=0, hi=None, now=None):
    now = self.seen(lo, hi) if now is None else now
    return now | {n: self._buffers[n + START][:1] for n in self.trained}


@pytest.mark.parametrize(
    ("where", "attribute", "mutant", "name"),
    [
        (pack, "keep", lambda bank, index, own=pack.keep: own(bank, 0 * index), "lora"),
        (Bank, "start_tensors", first_slot_s_start, "delora"),
        (placing, "PAST", (), "relora"),
    ],
    ids=["the first slot stays", "one anchor for all", "folds are not read"],
)
def test_a_slot_s_file_that_is_another_adapter_s(where, attribute, mutant, name, monkeypatch):
    check_any_slot_saves_and_loads(name)
    monkeypatch.setattr(where, attribute, mutant)
    caught(check_any_slot_saves_and_loads, name)


def test_dropout_that_is_another_in_another_process(monkeypatch, tmp_path):
    plant = (
        "own = seeds.stable_seed\n"
        "mutant = lambda *parts: own(*parts, hash('x') * ('dropout' in parts))\n"
    )
    here = {"seeds": seeds}
    exec(plant, here)
    monkeypatch.setattr(seeds, "stable_seed", here["mutant"])
    there = f"from loralab import seeds\n{plant}seeds.stable_seed = mutant\n"
    with pytest.raises(AssertionError, match=r"^lora"):
        check_another_process(["lora"], tmp_path, "Linear", there)


def ones_of_the_cpu(self, t, site):
    one = torch.eye(site.rank, dtype=t["D"].dtype)
    A = one[:, torch.arange(site.d_in) % site.rank]
    return t["D"], A.expand(*t["D"].shape[:-2], -1, -1)


def rates_of_the_cpu(self, sites, hyper, _original=AdamW.step):
    hyper.lr.mul_(torch.ones(len(hyper.lr)))
    _original(self, sites, hyper)


def drawn_there(self, site, evidence, _original=MiSS.init):
    t, source = _original(self, site, evidence), torch.Generator().manual_seed(0)
    return {"D": t["D"] + 0 * torch.rand(1, generator=source, device=t["D"].device)}


@pytest.mark.parametrize(
    ("cls", "attribute", "mutant"),
    [
        (MiSS, "factors", ones_of_the_cpu),
        (MiSS, "init", drawn_there),
        (AdamW, "step", rates_of_the_cpu),
    ],
)
def test_a_tensor_on_the_wrong_device(cls, attribute, mutant, monkeypatch):
    check_other_device("miss")
    monkeypatch.setattr(cls, attribute, mutant)
    with pytest.raises(AssertionError, match="another device"):
        check_other_device("miss")


@pytest.mark.parametrize("name", ["xgblora", "relora", "cola"])
def test_a_slot_that_folds_at_every_step_is_seen_to_diverge(name):
    rates = (1e-3, 1e6, 1e-3)
    trials = [
        toy_trial(name, steps=6, lr=lr, seed=k, settings={"every": 1}, clip=0.0)
        for k, lr in enumerate(rates)
    ]
    outcomes = train(trials).outcomes
    assert [o.status for o in outcomes] == ["done", "diverged", "done"]
    assert outcomes[1].step <= 4
    assert torch.isfinite(torch.tensor(outcomes[0].curve)).all()
