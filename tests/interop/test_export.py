"""Adapters for other programs: plain LoRA, merged models, and folders to folders."""

import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from loralab import adapt
from loralab.core.adapter import load
from loralab.core.bank import has_gain, mergeable
from loralab.core.files import export_adapter
from loralab.core.update import replaces
from loralab.errors import UserError
from loralab.interop.export import export, export_folder, import_peft
from loralab.interop.peft_lora import low_rank
from loralab.methods import all_methods
from tests.interop.models import gpt2, llama, logits, trained

ADAPTER = "adapter_model.safetensors"


@pytest.mark.parametrize("method", ["oft", "boft", "road"])
def test_a_turned_base_becomes_lora_from_its_folder_too(method, tmp_path, monkeypatch):
    adapter = trained(method)
    monkeypatch.setattr("loralab.models.load_model", lambda ref: (llama(), None))
    with pytest.warns(UserWarning, match="relative error"):
        wanted = load_file(adapter.export(tmp_path / "a", "lora", rank=3) / ADAPTER)
    folder = adapter.save(tmp_path / "own")
    with pytest.warns(UserWarning, match="relative error"):
        export_folder(folder, "lora", tmp_path / "b", "base", rank=3)
    found = load_file(tmp_path / "b" / ADAPTER)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].abs(), tensor.abs(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", list(all_methods()))
def test_plain_lora_is_exact_or_refused(method, tmp_path):
    adapter = trained(method)
    form = adapter.pack.slots[0].recipe.form
    reasons = {
        "its update depends on the input": not mergeable(form),
        "magnitude of its rows is not low-rank": has_gain(form),
        "another matrix in the base's place": replaces(form),
        "LoRA can only approximate it; say the rank": not low_rank(form),
    }
    words = next((words for words, holds in reasons.items() if holds), None)
    if words is not None:
        with pytest.raises(UserError, match=words):
            adapter.export(tmp_path, "lora")
        return
    model = llama()
    plain = load(model, adapter.export(tmp_path, "lora"))
    torch.testing.assert_close(logits(model), logits(adapter.model), rtol=0, atol=1e-5)
    assert plain.method == "lora" and not any(b.anchored for _, b in plain.pack.banks())


@pytest.mark.parametrize("method", ["hira", "oft", "boft", "ia3", "glora", "fourierft"])
def test_at_full_rank_every_dense_update_is_exact(method, tmp_path):
    """Also where the update reads the base's weight, or turns the base."""
    adapter = trained(method)
    done = export(adapter, tmp_path, "lora", rank=16)
    assert done.relative_error < 1e-5
    model = llama()
    load(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(adapter.model), rtol=0, atol=1e-4)


def test_a_dense_update_is_compressed_and_the_error_is_told(tmp_path):
    adapter = trained("loha")
    squares = [torch.zeros(()), torch.zeros(())]
    for _, bank in adapter.pack.banks():
        S = torch.linalg.svdvals(bank.delta()[0].detach())
        squares = [squares[0] + S[3:].square().sum(), squares[1] + S.square().sum()]
    wanted = (squares[0] / squares[1]).sqrt()
    with pytest.warns(UserWarning, match="relative error of 0"):
        done = export(adapter, tmp_path, "lora", rank=3)
    assert done.relative_error == pytest.approx(float(wanted), rel=1e-4)
    model = llama()
    again = load(model, tmp_path)
    assert {b.site.rank for _, b in again.pack.banks()} == {3}
    lost = total = 0.0
    for (_, one), (_, other) in zip(adapter.pack.banks(), again.pack.banks(), strict=True):
        lost += (one.delta() - other.delta()).detach().square().sum()
        total += one.delta().detach().square().sum()
    assert float((lost / total).sqrt()) == pytest.approx(done.relative_error, rel=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert export(trained("lora"), tmp_path / "exact", "lora").relative_error == 0


@pytest.mark.parametrize("make", [llama, gpt2])
def test_merged_models_stand_alone(make, tmp_path):
    adapter = trained("dora", make, modules_to_train=["lm_head"] if make is llama else [])
    model = adapter.model
    before, wanted = {n: p.clone() for n, p in model.named_parameters()}, logits(model)
    path = export_adapter(adapter, tmp_path, "merged")
    assert torch.equal(logits(model), wanted)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    alone = type(make()).from_pretrained(path)
    torch.testing.assert_close(logits(alone.eval()), wanted, rtol=0, atol=1e-5)


def test_a_merged_model_stays_merged_and_any_module_can_be_saved(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    adapter = adapt(net, "init_ab", rank=2, anchored=False)
    adapter.merge()
    adapter.export(tmp_path, "merged")
    assert adapter._merged is not None
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[n], t) for n, t in net.state_dict().items())


def test_folders_are_exported_without_their_base_where_that_is_possible(tmp_path, monkeypatch):
    adapter = trained("pissa")
    folder = adapter.save(tmp_path / "ours")
    for to in ("peft", "lora"):
        model = llama()
        load(model, export_folder(folder, to, tmp_path / to).path)
        torch.testing.assert_close(logits(model), logits(adapter.model), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="does not say which base it was trained on"):
        export_folder(folder, "merged", tmp_path / "merged")
    base = tmp_path / "base"
    llama().save_pretrained(base)
    import loralab.models

    def open_base(ref):
        assert ref == str(base)
        return type(llama()).from_pretrained(ref).eval(), None

    monkeypatch.setattr(loralab.models, "load_model", open_base)
    path = export_folder(folder, "merged", tmp_path / "merged", str(base)).path
    alone = type(llama()).from_pretrained(path).eval()
    torch.testing.assert_close(logits(alone), logits(adapter.model), rtol=0, atol=1e-5)


def test_an_unknown_target(tmp_path):
    with pytest.raises(UserError, match="cannot be exported to 'marged'; did you mean merged"):
        trained("lora", steps=0).export(tmp_path, "marged")


def test_a_rank_is_for_lora_alone(tmp_path):
    adapter = trained("lora", steps=0)
    own = adapter.save(tmp_path / "own")
    for to in ("peft", "merged"):
        with pytest.raises(UserError, match="takes no rank"):
            adapter.export(tmp_path / to, to, rank=2)
        with pytest.raises(UserError, match="takes no rank"):
            export_folder(own, to, tmp_path / to, rank=2)


def test_nothing_is_written_over_what_it_is_made_from(tmp_path):
    base, own = tmp_path / "base", tmp_path / "own"
    llama().save_pretrained(base)
    model = type(llama()).from_pretrained(base)
    adapter = adapt(model, "lora", rank=2)
    adapter.save(own)
    before = {f: f.read_bytes() for f in (*base.iterdir(), *own.iterdir())}
    for to in ("peft", "lora", "merged"):
        for where in (base, own):
            with pytest.raises(UserError, match=r"is the folder of the .* itself"):
                export_folder(own, to, where, rank=1 if to == "lora" else None)
        with pytest.raises(UserError, match="folder of the base itself"):
            adapter.export(base, to)
    for where in (base, own):
        with pytest.raises(UserError, match=r"is the folder of the .* itself"):
            import_peft(own, where)
    with pytest.raises(UserError, match="holds an adapter"):
        adapter.export(own, "merged")
    files = {f: f.read_bytes() for f in (*base.iterdir(), *own.iterdir())}
    assert files == before
