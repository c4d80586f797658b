"""The demo's two studies keep what the README promises, and the command runs from nothing."""

import pytest

from loralab.cli import demo
from loralab.study.parse import read_spec
from tests.cli.conftest import SPEC


@pytest.fixture
def spec_of(tmp_path):
    def read(quick):
        path = tmp_path / "study.toml"
        path.write_text(demo.packaged(quick))
        return read_spec(path)

    return read


def test_the_demo_is_as_large_as_promised(spec_of):
    spec = spec_of(quick=False)
    assert len(spec.methods) >= 10 and spec.curvature and spec.widen
    assert all(spec.grid(method).n >= 8 for method in spec.methods)
    assert len({*spec.seeds, *spec.confirm_seeds}) >= 2 and len(spec.confirm_seeds) >= 2


def test_the_quick_demo_has_the_same_shape(spec_of):
    spec = spec_of(quick=True)
    assert spec.baseline == "lora" and len(spec.methods) >= 3 and spec.curvature


def test_a_demo_runs_goes_on_and_keeps_its_folder(cli, cli_json, base, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "packaged", lambda quick: SPEC)
    out = tmp_path / "demo"
    code, shown, err = cli("demo", "--out", out, "--workers", "1")
    assert code == 0, err
    assert shown.rstrip().endswith(f"report: {out / 'report.html'}") and "lora_fa" in shown
    assert cli_json("demo", "--out", out, "--workers", "1")["report"] == str(out / "report.html")
    monkeypatch.setattr(demo, "packaged", lambda quick: SPEC + "# changed\n")
    code, _, err = cli("demo", "--out", out, "--workers", "1")
    assert code == 2 and "another study" in err


@pytest.mark.slow
def test_the_quick_demo_for_real(cli_json, tmp_path):
    found = cli_json("demo", "--quick", "--out", tmp_path)
    assert found["verdict"] and (tmp_path / "report.html").stat().st_size > 50_000
