"""Wrong input: one row per mistake. Exit code 2, one line that helps, no traceback."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from tests.cli.conftest import SPEC, TASK

TRAIN = ("train", "--model", "tiny", "--data", TASK, "--method", "lora", "--steps", "1")


def spec_with(folder, old, new):
    path = folder / "wrong.toml"
    path.write_text(SPEC.replace(old, new))
    return path


def jsonl(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def damaged(adapter, folder, keep):
    copy = folder / "damaged"
    shutil.copytree(adapter, copy)
    file = copy / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep] if keep else b"no safetensors at all")
    return copy


def without(adapter, folder, name):
    copy = Path(shutil.copytree(adapter, folder / "part"))
    (copy / name).unlink()
    return copy


def not_finite(adapter, folder):
    file = Path(shutil.copytree(adapter, folder / "nan")) / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        tensors, metadata = {k: opened.get_tensor(k) for k in opened.keys()}, opened.metadata()  # noqa: SIM118
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file, metadata=metadata)
    return file.parent


# Each row: what it is, the command as a function of (adapter's folder, empty folder), and words
# that the sentence must hold.
MISTAKES = {
    "unknown command": (lambda a, t: ("trian",), ["'trian'", "did you mean train"]),
    "unknown study command": (lambda a, t: ("study", "rn", "x"), ["study run"]),
    "unknown option": (lambda a, t: (*TRAIN, "--out", t, "--rnk", "4"), ["--rnk", "--rank"]),
    "missing option": (lambda a, t: ("train", "--model", "tiny"), ["--data and --method and"]),
    "missing argument": (lambda a, t: ("show",), ["METHOD"]),
    "extra argument": (lambda a, t: ("show", "lora", "dora"), ["'dora'"]),
    "no number": (lambda a, t: (*TRAIN, "--out", t, "--lr", "much"), ["--lr", "'much'"]),
    "no whole number": (
        lambda a, t: (*TRAIN, "--steps=1.5", "--out", t),
        ["--steps must be a whole number, not '1.5'"],
    ),
    "no choice": (lambda a, t: ("export", a, "--to", "pfet", "--out", t), ["'pfet'", "merged"]),
    "unknown method": (lambda a, t: ("show", "pisa"), ["'pisa'", "did you mean pissa"]),
    "unknown method in a study": (
        lambda a, t: ("study", "run", spec_with(t, '"lora_fa"', '"lora_fe"'), "--out", t / "o"),
        ["wrong.toml: methods[1]", "'lora_fe'", "lora_fa"],
    ),
    "unknown setting": (
        lambda a, t: (*TRAIN, "--out", t, "--set", "scalng=x"),
        ["'scalng'", "scaling"],
    ),
    "setting without a value": (lambda a, t: (*TRAIN, "--out", t, "--set", "x"), ["NAME=VALUE"]),
    "empty value": (lambda a, t: (*TRAIN, "--out", ""), ["--out has an empty value"]),
    "data without a value": (
        lambda a, t: ("train", "--model", "tiny", "--data", "--method", "lora", "--out", t),
        ["--data needs a task or a file"],
    ),
    "no worker": (
        lambda a, t: ("study", "run", spec_with(t, "", ""), "--workers", "0", "--out", t / "o"),
        ["--workers", "at least 1, not 0"],
    ),
    "no slot": (
        lambda a, t: ("study", "plan", spec_with(t, "", ""), "--max-slots", "-3"),
        ["--max-slots", "at least 1, not -3"],
    ),
    "no such device": (
        lambda a, t: ("study", "run", spec_with(t, "", ""), "--device", "cuda:9", "--out", t / "o"),
        ["'cuda:9'"],
    ),
    "unknown axis": (lambda a, t: ("methods", "--axis", "x"), ["'x'", "initialization"]),
    "missing file": (lambda a, t: ("study", "run", t / "no.toml"), ["no.toml"]),
    "missing study": (lambda a, t: ("report", t / "none"), ["none"]),
    "missing study, status": (lambda a, t: ("study", "status", t / "none"), ["none"]),
    "missing data": (
        lambda a, t: (*TRAIN[:4], t / "no.jsonl", *TRAIN[5:], "--out", t),
        ["no.jsonl"],
    ),
    "missing adapter": (lambda a, t: ("eval", t / "none", "--task", TASK), ["none"]),
    "folder without an adapter": (
        lambda a, t: ("generate", t, "--prompt", "a"),
        ["adapter_config.json"],
    ),
    "unknown task": (lambda a, t: ("eval", a, "--task", "sinthetic"), ["synthetic"]),
    "unknown model": (
        lambda a, t: ("train", "--model", t / "no", *TRAIN[3:], "--out", t),
        ["no"],
    ),
    "malformed TOML": (
        lambda a, t: ("study", "plan", spec_with(t, "steps = 2", "steps = = 2")),
        ["wrong.toml", "line 4, column 9"],
    ),
    "wrong type in a study": (
        lambda a, t: ("study", "plan", spec_with(t, "steps = 2", 'steps = "two"')),
        ["wrong.toml", "steps must be a whole number"],
    ),
    "rank larger than the layer": (
        lambda a, t: (*TRAIN, "--out", t, "--rank", "99"),
        ["rank 99", "'model.layers.0.self_attn.q_proj'", "16"],
    ),
    "rank of zero": (lambda a, t: (*TRAIN, "--out", t, "--rank", "0"), ["rank", "0"]),
    "negative learning rate": (
        lambda a, t: (*TRAIN, "--out", t, "--lr", "-0.1"),
        ["lr", "negative", "-0.1"],
    ),
    "negative learning rate in a study": (
        lambda a, t: ("study", "run", spec_with(t, "[1e-3, 1e-2]", "[1e-3, -1e-2]")),
        ["lr[1]", "-0.01"],
    ),
    "no epochs": (
        lambda a, t: (*TRAIN[:-2], "--epochs", "-1", "--out", t),
        ["--epochs", "-1"],
    ),
    "learning rate that diverges": (
        lambda a, t: (*TRAIN[:-1], "3", "--out", t, "--lr", "1e30"),
        ["diverged at step", "1e+30"],
    ),
    "target that fits nothing": (
        lambda a, t: (*TRAIN, "--out", t, "--targets", "q_prj"),
        ["'q_prj'", "q_proj"],
    ),
    "truncated safetensors": (
        lambda a, t: ("eval", damaged(a, t, 100), "--task", TASK),
        ["adapter_model.safetensors"],
    ),
    "unreadable safetensors": (
        lambda a, t: ("export", damaged(a, t, 0), "--to", "lora", "--out", t),
        ["adapter_model.safetensors"],
    ),
    "data row without a field": (
        lambda a, t: (
            *("train", "--model", "tiny", "--method", "lora", "--steps", "1", "--out", t),
            *("--data", jsonl(t, {"prompt": "a", "completion": "b"}, {"prompt": "a"})),
        ),
        ["rows.jsonl", "2", "completion"],
    ),
    "folder that is a file": (
        lambda a, t: (*TRAIN, "--out", jsonl(t, {})),
        ["rows.jsonl", "folder is needed"],
    ),
    "file that is a folder": (
        lambda a, t: ("curvature", *TRAIN[1:-2], "--out", t),
        ["file is needed"],
    ),
    "adapter over its own base": (
        lambda a, t: (
            *("train", "--model", t / "base", *TRAIN[3:]),
            *("--out", (t / "base").mkdir() or t / "base"),
        ),
        ["base", "the folder of the base itself"],
    ),
    "another adapter's folder": (
        lambda a, t: (*TRAIN, "--out", shutil.copytree(a, t / "old")),
        ["holds an adapter whose method is 'pissa', not 'lora'"],
    ),
    "an export's folder": (
        lambda a, t: (*TRAIN, "--out", without(a, t, "training.json")),
        ["holds an adapter from elsewhere"],
    ),
    "adapter that is not finite": (
        lambda a, t: ("eval", not_finite(a, t), "--task", TASK),
        ["adapter_model.safetensors", "NaN", "lower learning rate"],
    ),
    "export over the adapter": (
        lambda a, t: ("export", a, "--to", "lora", "--rank", "1", "--out", a),
        ["the folder of the adapter itself"],
    ),
    "unknown block": (
        lambda a, t: ("curvature", *TRAIN[1:-2], "--blocks", "q_prj"),
        ["'q_prj'", "q_proj"],
    ),
    "error bound that bounds nothing": (
        lambda a, t: ("curvature", *TRAIN[1:-2], "--rtol", "nan"),
        ["--rtol", "above 0 and below 1", "nan"],
    ),
    "way that the method does not allow": (
        lambda a, t: ("curvature", *TRAIN[1:-3], "pissa", "--way", "closed_form"),
        ["closed form", "B = 0", "gauss_newton"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_sentence_and_code_2(cli, adapter, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    command, words = MISTAKES[name]
    code, out, err = cli(*command(adapter, tmp_path))
    said = [line for line in err.splitlines() if line.startswith("loralab: ")]
    assert code == 2, err
    assert out == "" and len(said) == 1 and err.endswith(said[0] + "\n") and "Traceback" not in err
    assert [word for word in words if word not in said[0]] == []


needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")


@needs_full
def test_a_full_disk_costs_no_numbers(cli, base):
    words = ("curvature", *TRAIN[1:-2], "--rank", "2", "--items", "2", "--out", "/dev/full")
    code, out, err = cli(*words)
    assert code == 2 and "no space is left on the disk for '/dev/full'" in err
    assert "median lambda max" in out


def test_no_permission_is_told_before_any_work(cli, base, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("loralab.training.loop.train_pack", None)  # not reached
    code, _, err = cli(*TRAIN, "--out", tmp_path / "a")
    assert code == 2 and err.count("\n") == 1 and "Permission denied" in err


def test_a_disk_that_fills_up_in_a_study_loses_nothing(cli, cli_json, spec, tmp_path, monkeypatch):
    from loralab.study.store import Store

    finish = Store.finish_pack
    calls = []

    def full(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))
        return finish(self, *args)

    out = tmp_path / "o"
    words = ("study", "run", spec, "--out", out, "--max-slots", "2", "--workers", "1")
    monkeypatch.setattr(Store, "finish_pack", full)
    code, _, err = cli(*words)
    assert code == 2 and "No space left" in err and "Traceback" not in err
    monkeypatch.setattr(Store, "finish_pack", finish)
    assert cli_json("study", "status", out)["trials"]["grid"] == {"done": 2, "waiting": 2}
    assert cli_json(*words)["finished"]


def test_an_interruption_says_how_to_go_on(cli, base, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("loralab.training.loop.train_pack", interrupted)
    code, out, err = cli(*TRAIN, "--out", tmp_path / "a")
    assert code == 130 and out == "" and err.count("\n") == 1 and "checkpoint" in err


def test_a_fault_of_ours_says_how_to_see_more(cli, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("loralab.cli.catalogue.described", broken)
    code, out, err = cli("show", "lora")
    assert code == 1 and out == "" and err.count("\n") == 1
    assert "ZeroDivisionError" in err and "LORALAB_DEBUG=1" in err
    monkeypatch.setenv("LORALAB_DEBUG", "1")
    assert "Traceback" in cli("show", "lora")[2]
