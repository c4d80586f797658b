import json

import pytest

from loralab.cli import main


@pytest.fixture
def cli(capsys):
    """Run one command in this process: (exit code, stdout, stderr)."""

    def run(*words):
        code = main([str(word) for word in words])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture
def cli_json(cli):
    """Run one command with --json and return what it printed, which must be JSON alone."""

    def run(*words):
        code, out, err = cli(*words, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Make `tiny` a base that was trained for two steps only: commands matter here, not scores.

    Worker processes do not see this, so studies here run with `--workers 1`.
    """
    from loralab.models import tiny

    patch = pytest.MonkeyPatch()
    patch.setenv("LORALAB_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setitem(tiny.RECIPES, "tiny", tiny.TinyRecipe(width=16, layers=1, heads=2, steps=2))
    yield "tiny"
    patch.undo()


TASK = "synthetic?n_train=64&n_validation=8&n_test=8"


@pytest.fixture(scope="session")
def adapter(base, tmp_path_factory):
    """Return the folder of an adapter that `loralab train` wrote."""
    out = tmp_path_factory.mktemp("adapter") / "lora"
    words = ["train", "--model", base, "--data", TASK, "--method", "pissa", "--steps", "3"]
    assert main([*words, "--rank", "4", "--lr", "1e-3", "--out", str(out)]) == 0
    return out


SPEC = f"""
model = "tiny"
task = "{TASK}"
steps = 2
ranks = [2]
batch_sizes = [4]
lr = [1e-3, 1e-2]
seeds = 1
confirm_seeds = 1
widen = false

[[methods]]
name = "lora"

[[methods]]
name = "lora_fa"
"""


@pytest.fixture
def spec(base, tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(SPEC)
    return path
