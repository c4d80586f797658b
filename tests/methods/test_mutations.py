"""Planted bugs are caught: those that others fell into. `test_nudges.py` does every hook."""

import contextlib

import numpy as np
import pytest
import torch

from loralab import testing
from loralab.core.bank import Bank
from loralab.core.layers import wide
from loralab.core.merge import Merged
from loralab.core.pack import Pack
from loralab.core.sites import LinearSite
from loralab.methods import get
from loralab.methods.budgeting.adalora import AdaBudget, AdaSVD
from loralab.methods.expansion.gralora import GraLoRA
from loralab.methods.expansion.loha import LoHa
from loralab.methods.expansion.lora import LoRA
from loralab.methods.experts.hydralora import HydraLoRA
from loralab.methods.experts.mixlora import MixLoRA
from loralab.methods.initialization.lora_ga import LoRAGA
from loralab.methods.initialization.milora import MiLoRA
from loralab.methods.initialization.olora import OLoRA
from loralab.methods.initialization.pissa import PiSSA
from loralab.methods.optimization.dora import DoRA
from loralab.methods.optimization.lora_plus import LoRAPlus
from loralab.methods.sharing.randlora import RandLoRA
from loralab.methods.sharing.vera import VeRA
from loralab.recipe import Evidence, Hyper, Site, SiteState
from loralab.testing.toy import slot_tensors, toy_trial, train
from loralab.training.adamw import AdamW
from loralab.training.states import BankState
from tests.core import test_blocks as blocks
from tests.methods import reference
from tests.methods import test_formulas_forms as forms
from tests.methods.test_nudges import check_golden


def golden(name):
    return lambda: check_golden(name)


def formula(form, shape=(8, 12, 4)):
    return lambda: forms.test_form_equals_the_loops(form, shape, (3,))


def start(name):
    """The start's update against its naive numpy form."""

    def check():
        W = torch.tensor(np.random.default_rng(0).normal(size=(12, 8)))
        one = get(name).recipe.start
        t = one.init(Site("s", 8, 12, 4), Evidence(W, 2.0, 0, "s"))
        wanted = reference.STARTS[type(one).__name__](W.numpy(), 4, 2.0, None)
        np.testing.assert_allclose(2.0 * (t["B"] @ t["A"]).numpy(), wanted, atol=1e-10)

    return check


def adamw_is_adamw():
    """Three steps of the whole trainer's rule against the number-by-number algorithm."""
    state, rng = SiteState(), np.random.default_rng(0)
    p, grads = rng.normal(size=(1, 3, 2)), rng.normal(size=(3, 1, 3, 2))
    state.site, state.state = Site("s", 2, 3, 1), {}
    state.t, hyper = (
        {"A": torch.tensor(p)},
        Hyper(*torch.tensor([[0.1], [0.2]], dtype=torch.float64)),
    )
    for g in grads:
        state.g = {"A": torch.tensor(g)}
        AdamW().step([state], hyper)
    wanted = reference.adamw(p, list(grads), 0.1, decay=0.2)
    np.testing.assert_allclose(state.t["A"].numpy(), wanted, rtol=1e-7)


def conformance(check, name):
    return lambda: getattr(testing, f"check_{check}")(name)


def restart_keeps_the_function():
    """ReLoRA's folded phases are part of what it has learned."""
    trained = train([toy_trial("relora", steps=10, settings={"every": 5})])
    bank = next(trained.pack.banks())[1]
    assert bank.delta().norm() > bank.form.delta(bank.tensors(), bank.site).norm() * 0.5
    assert bank.factors()[1].shape[-2] == 2 * bank.site.rank


# Mutants: what a hurried reader of the paper, or a known code base, wrote instead.


def no_exchange(self, t, x, site):
    """GraLoRA without the exchange of input and output parts."""
    parts = x.unflatten(-1, (self.k, -1)).transpose(-3, -2)
    return ((parts @ t["A"]) @ t["B"]).transpose(-3, -2).flatten(-2)


def swapped_blocks(self, t, site):
    A, B = t["A"].unflatten(-1, (self.k, -1)), t["B"].unflatten(-2, (self.k, -1))
    return torch.einsum("...jnir,...ijrm->...jmin", A, B).flatten(-2).flatten(-3, -2)


def product_of_outputs(self, t, x, site):
    return (x @ t["A1"].mT @ t["B1"].mT) * (x @ t["A2"].mT @ t["B2"].mT)


def both_zero(self, site, evidence, _original=LoHa.init):
    t = _original(self, site, evidence)
    return {**t, "B1": torch.zeros_like(t["B1"])}


def leading_triplets(self, site, evidence):
    return PiSSA().init(site, evidence)


def rows_of_q(self, site, evidence):
    Q, R = torch.linalg.qr(evidence.weight.mT, mode="reduced")
    return {"A": Q[:, : site.rank].mT.clone(), "B": R[: site.rank].mT.clone()}


def peft_lora_ga(self, site, evidence, _original=LoRAGA.init):
    """B times the gradient's singular values: PEFT's version, not the paper's."""
    t = _original(self, site, evidence)
    S = torch.linalg.svdvals(evidence.gradient)[site.rank : 2 * site.rank]
    return {**t, "B": t["B"] * S}


def gain_without_norm(self, t, row_norm):
    return t["m"]


def norm_of_the_whole(self, t, row_norm):
    return t["m"] / row_norm.square().sum(-1, keepdim=True).sqrt()


def no_softmax(self, t, x, site):
    omega, h = x @ t["W_g"].mT, x @ t["A"].mT
    return (omega.unsqueeze(-1) * h.unsqueeze(-2)).flatten(-2) @ t["B"].mT.flatten(-3, -2)


def swapped_diagonals(self, t, site):
    B, A = t["B"][..., : site.d_out, :], t["A"][..., : site.d_in]
    return (B * t["d"].unsqueeze(-2)) * t["b"].mean(), A


def untrainable_d(self, site, evidence, _original=VeRA.init):
    t = _original(self, site, evidence)
    return {**t, "d": torch.zeros_like(t["d"])}


def never_turned(self, t, site):
    B, L, AG = self._bases(t, site)
    return L.unsqueeze(-1) * AG.mT if site.d_out < site.d_in else B, L.unsqueeze(-1) * AG


def one_base_only(self, t, x, site, _original=RandLoRA.branch):
    first = torch.cat([t["Lambda"][..., :1, :], 0 * t["Lambda"][..., 1:, :]], -2)
    return _original(self, {**t, "Lambda": first}, x, site)


def no_uncertainty(self, site, _original=AdaBudget.score):
    _original(self, site)
    mean = {n: site.state["mean." + n] for n in ("Lambda", "P", "Q")}
    return mean["Lambda"] + mean["P"].mean(-2) + mean["Q"].mean(-1)


def linear_budget(self, step, n_steps, first, last):
    t, t_i, t_f = step + 1, self.t_initial * n_steps, self.t_final * n_steps
    left = 1 - (t - t_i) / (n_steps - t_f - t_i)
    return int(last + (first - last) * min(1.0, max(0.0, left)))


def half_penalty(self, t, site):
    gap = t["P"].mT @ t["P"] - torch.eye(t["P"].shape[-1], dtype=t["P"].dtype)
    return self.gamma * gap.square().sum((-2, -1))


def plus_on_a(self, name):
    return self.ratio if name == "A" else 1.0


def plus_on_all_vectors(self, name):
    """PEFT sends every one-dimensional tensor, DoRA's magnitude too, to B's group."""
    return self.ratio if name != "A" else 1.0


def uncorrected(self, sites, hyper, _original=AdamW.step):
    for s in sites:
        if "steps" not in s.state:
            for name, tensor in s.t.items():
                s.state |= {"m." + name: torch.zeros_like(tensor)}
                s.state |= {"v." + name: torch.zeros_like(tensor)}
            s.state["steps"] = torch.full_like(hyper.lr, 1e6)
    _original(self, sites, hyper)


def one_scale_for_all(self, lo=0, hi=None, _original=Bank.factors):
    B, A = _original(self, lo, hi)
    ratio = self.scale[0] / self.scale[lo:hi]
    return B * ratio[:, None, None], A


def forward_without_rows(self, module, x, _original=LinearSite.forward):
    """A slot that sees the mean of the whole batch: pack-mates matter."""
    return _original(self, module, x + 1e-4 * x.mean(0, keepdim=True))


@contextlib.contextmanager
def unfreezing_disable(self):
    """PEFT's disable_adapter: afterwards everything is trained, frozen tensors too."""
    self.layout.disabled = True
    yield
    self.layout.disabled = False
    for p in self.parameters():
        p.requires_grad_(True)
    for p in self.model.parameters():
        p.requires_grad_(True)


def unmerge_by_subtraction(self, _original=Merged.undo):
    self._aside = [
        (module, n, torch.nn.Parameter(now - (now - old), old.requires_grad))
        for module, n, old in self._aside
        for now in [module._parameters[n].detach()]
    ]
    _original(self)


def undivided(self, t, x, site):
    p = (x @ t["W_g"].mT).softmax(-1)
    expert = p.argsort(-1, descending=True)[..., : self.top_k]
    return expert, p.gather(-1, expert)


def without_blocks(self, _original=Pack.attach):
    self._blocks.clear()
    _original(self)


MUTATIONS = {
    "scale over sqrt(r)": (LoRA, "scale", lambda self, a, r: a / r**0.5, golden("lora")),
    "gralora: no exchange": (GraLoRA, "branch", no_exchange, formula("GraLoRA")),
    "gralora: branch is not delta": (
        GraLoRA, "branch", no_exchange, conformance("dense_equals_forward", "gralora")),
    "gralora: blocks transposed": (GraLoRA, "delta", swapped_blocks, formula("GraLoRA", (8, 8, 4))),
    "loha: product of outputs": (LoHa, "branch", product_of_outputs, formula("LoHa")),
    "loha: both B zero": (
        LoHa, "init", both_zero, conformance("every_tensor_learns", "loha")),
    "milora: the top instead of the bottom": (MiLoRA, "init", leading_triplets, start("milora")),
    "pissa: no anchor": (PiSSA, "anchored", False, conformance("starts_at_base", "pissa")),
    "olora: of the transpose": (OLoRA, "init", rows_of_q, start("olora")),
    "lora_ga: PEFT's": (LoRAGA, "init", peft_lora_ga, golden("lora_ga")),
    "dora: no norm": (
        DoRA, "gain", gain_without_norm, lambda: forms.test_dora_rescales_rows((3,))),
    "dora: norm of the whole matrix": (
        DoRA, "gain", norm_of_the_whole, conformance("starts_at_base", "dora")),
    "hydralora: no softmax": (HydraLoRA, "branch", no_softmax, formula("HydraLoRA")),
    "vera: b averaged": (VeRA, "factors", swapped_diagonals, formula("VeRA")),
    "vera: d and b both zero": (
        VeRA, "init", untrainable_d, conformance("every_tensor_learns", "vera")),
    "randlora: roles never turned": (RandLoRA, "factors", never_turned, formula("RandLoRA")),
    "randlora: one base only": (RandLoRA, "branch", one_base_only, formula("RandLoRA")),
    "adalora: no uncertainty": (
        AdaBudget, "score", no_uncertainty, forms.test_adalora_prunes_as_the_naive_allocator),
    "adalora: linear budget": (
        AdaBudget, "budget", linear_budget, forms.test_adalora_budget_is_cubic),
    "adalora: half the penalty": (
        AdaSVD, "penalty", half_penalty, forms.test_penalty_is_the_papers),
    "lora_plus: the wrong factor": (LoRAPlus, "lr_ratio", plus_on_a, golden("lora_plus")),
    "adamw: moments not corrected": (AdamW, "step", uncorrected, adamw_is_adamw),
    "relora: restarts forget": (BankState, "fold", lambda *_: None, restart_keeps_the_function),
    "core: one scale for the pack": (
        Bank, "factors", one_scale_for_all, conformance("packed_equals_alone", "lora")),
    "core: disable unfreezes": (
        Pack, "disable", unfreezing_disable, conformance("disable_is_exact", "lora_fa")),
    "core: unmerge subtracts": (
        Merged, "undo", unmerge_by_subtraction, conformance("merge_is_exact", "lora")),
    "core: merge leaves the bias": (
        Bank, "biased", lambda *args: wide(args[2]), conformance("dense_equals_forward", "ia3")),
    "mixlora: weights not divided by their sum": (
        MixLoRA, "route", undivided, blocks.test_experts_are_whole_feed_forward_blocks),
    "mixlora: every layer mixes": (
        Pack, "attach", without_blocks, blocks.test_experts_are_whole_feed_forward_blocks),
    "core: slots see each other": (
        LinearSite, "forward", forward_without_rows, conformance("packed_equals_alone", "lora")),
}  # fmt: skip


@pytest.mark.parametrize("bug", MUTATIONS)
def test_planted_bug_is_caught(bug, monkeypatch):
    cls, attribute, mutant, check = MUTATIONS[bug]
    check()
    monkeypatch.setattr(cls, attribute, mutant)
    with pytest.raises((AssertionError, RuntimeError)):
        check()


def test_lora_plus_leaves_the_magnitude_alone(monkeypatch):
    """DoRA's magnitude belongs to neither factor; this bug shows on the combination only."""

    def moved():
        trial = toy_trial("dora", steps=1, swaps={"rule": "lora_plus"}, lr=1e-3, warmup=0.0)
        plain = toy_trial("dora", steps=1, lr=1e-3, warmup=0.0)
        first, second = slot_tensors(train([trial]), 0), slot_tensors(train([plain]), 0)
        return {n for n, t in first.items() if not torch.equal(t, second[n])}

    assert {n.rsplit(".")[-1] for n in moved()} == {"B"}
    monkeypatch.setattr(LoRAPlus, "lr_ratio", plus_on_all_vectors)
    assert {n.rsplit(".")[-1] for n in moved()} == {"B", "m"}
