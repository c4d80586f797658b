"""Adapter folders that are missing, damaged or cannot be written."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from loralab import adapt
from loralab.core.adapter import load
from loralab.core.files import CONFIG, WEIGHTS, Folder, read_folder, write_folder
from loralab.errors import UserError


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


@pytest.fixture
def folder(tmp_path):
    return adapt(net(), rank=2).save(tmp_path / "adapter")


def cut(file, n):
    file.write_bytes(file.read_bytes()[:n])


DAMAGE = {
    "no config": (lambda f: (f / CONFIG).unlink(), "no adapter folder: it has no adapter_config"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "pickle": (
        lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
        "a pickle, which is never loaded; load it in PEFT",
    ),
    "bad JSON": (
        lambda f: (f / CONFIG).write_text('{\n "peft_type": "LORA",\n "r": }'),
        r"adapter_config.json is not JSON: Expecting value at line 3, column 7",
    ),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "names no peft_type"),
    "not text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "is not UTF-8"),
    "truncated": (lambda f: cut(f / WEIGHTS, 900), "truncated or not a safetensors file"),
    "empty": (lambda f: cut(f / WEIGHTS, 0), "truncated or not a safetensors file"),
    "foreign": (lambda f: (f / WEIGHTS).write_bytes(b"PK" * 99), "not a safetensors file"),
    "a folder": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()),
        "has no adapter_model.safetensors",
    ),
    "no tensors": (
        lambda f: save_file({}, f / WEIGHTS, read_folder(f).config and {"format": "pt"}),
        "holds no tensor of a LORA adapter",
    ),
    "other record": (
        lambda f: write_folder(f, Folder(*_parts(f)[:2], {"version": "9.9"})),
        "is not one that this version .* reads",
    ),
    "record cut": (
        lambda f: save_file(read_folder(f).tensors, f / WEIGHTS, {"loralab": "{"}),
        "loralab record inside .* is damaged",
    ),
    "tensor gone": (
        lambda f: _without(f, "0.lora_A"),
        "the adapter's files have no lora_A.weight for layer '0'",
    ),
}  # fmt: skip


def _parts(path):
    read = read_folder(path)
    return read.config, read.tensors, read.record


def _without(path, word):
    config, tensors, record = _parts(path)
    write_folder(path, Folder(config, {n: t for n, t in tensors.items() if word not in n}, record))


@pytest.mark.parametrize("case", list(DAMAGE))
def test_damage_gets_one_sentence_and_leaves_the_model_alone(case, folder):
    damage, words = DAMAGE[case]
    damage(folder)
    model = net()
    with pytest.raises(UserError, match=words) as caught:
        load(model, folder)
    assert "\n" not in str(caught.value)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_a_path_that_is_none(tmp_path):
    with pytest.raises(UserError, match="there is no adapter folder"):
        load(net(), tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; an adapter is the folder"):
        load(net(), tmp_path / "file")


def test_other_sizes_name_the_layer(folder):
    with pytest.raises(UserError, match="layer '2' is 3 x 5 in the model and 4 x 5 in the adapter"):
        load(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), folder)
    with pytest.raises(UserError, match="layer '2' is a ReLU here"):
        load(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.ReLU()), folder)


def test_a_failed_write_tells_why_and_keeps_what_was_there(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(UserError, match=r"cannot write to .*: No space left on device"):
            adapt(net(), rank=1).save(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    with pytest.raises(UserError, match="Not a directory"):
        adapt(net(), rank=1).save(folder / CONFIG / "below")


def test_files_are_as_readable_as_any_other(folder, tmp_path):
    (tmp_path / "plain").touch()
    rights = (tmp_path / "plain").stat().st_mode
    assert {p.stat().st_mode for p in folder.iterdir()} == {rights}


def test_peft_reads_the_metadata_as_its_own(folder):
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, "pt") as opened:
        assert opened.metadata()["format"] == "pt"
        assert json.loads(opened.metadata()["loralab"])["method"] == "lora"
    assert "loralab" not in read_folder(folder).config
