import re
from pathlib import Path

import pytest

from loralab.curvature.measure import WAYS
from loralab.errors import UserError
from loralab.study.grid import Grid
from loralab.study.parse import parse, read_spec
from loralab.study.spec import CURVATURE_WAYS, StudySpec

PLAIN = {"task": "synthetic", "steps": 10, "methods": ["lora"]}


def said(**changes):
    with pytest.raises(UserError) as caught:
        parse({**PLAIN, **changes}, "s.toml")
    return str(caught.value)


def test_a_spec_survives_its_own_dictionary():
    spec = parse(
        {
            **PLAIN,
            "methods": [
                "lora",
                {"name": "dora", "init": "pissa", "alpha": "2r", "lr_shift": -4},
                {"name": "lora_plus", "label": "x4", "settings": {"ratio": 4.0}, "lr": [1e-3]},
            ],
            "targets": ["q_proj"],
            "budget": {"trials": 99},
            "store": "postgresql://host/studies",
        },
        "s.toml",
    )
    assert StudySpec.from_dict(spec.to_dict()) == spec
    assert [m.label for m in spec.methods] == ["lora", "dora+pissa", "x4"]
    assert (spec.seeds, spec.confirm_seeds) == ((0, 1), (2, 3, 4))


def test_the_hash_knows_what_changes_numbers():
    spec = parse(PLAIN, "s.toml")
    assert parse({**PLAIN, "name": "other", "lr": {"start": 1e-5}}, "s.toml").hash == spec.hash
    assert parse({**PLAIN, "dropout": 0.1}, "s.toml").hash != spec.hash


def test_alpha_rules():
    spec = parse({**PLAIN, "methods": ["lora", {"name": "dora", "alpha": 3}]}, "s.toml")
    lora, dora = spec.methods
    assert spec.alpha_of(lora, 8) is None and spec.alpha_of(dora, 8) == 3.0
    for rule, alpha in (("r", 8.0), ("2r", 16.0), ("0.5r", 4.0), (5, 5.0)):
        assert parse({**PLAIN, "alpha": rule}, "s.toml").alpha_of(lora, 8) == alpha


def test_epochs_become_steps_of_the_batch_size():
    data = {key: value for key, value in PLAIN.items() if key != "steps"}
    spec = parse({**data, "epochs": 1.5}, "s.toml")
    assert spec.n_steps(16, 100) == 10 and spec.n_steps(1000, 100) == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"learning_rate": 1}, "s.toml: learning_rate is not a known key"),
        ({"batch_size": 8}, "batch_size is not a known key; did you mean batch_sizes?"),
        ({"lr": -1e-4}, "s.toml: lr[0] must be above 0, not -0.0001"),
        ({"lr": {"start": 1e-2, "stop": 1e-3}}, "lr.stop must be at least start (0.01), not 0.001"),
        ({"lr": {"from": 1}}, "s.toml: lr.from is not a known key"),
        ({"lr": [1e-3, 1e-3]}, "lr names a value twice"),
        ({"lr": float("nan")}, "lr[0] must be finite"),
        ({"methods": []}, "methods must be a list with at least one method"),
        (
            {"methods": [{"name": "lora", "strat": "pissa"}]},
            "methods[0].strat is not a known key",
        ),
        ({"methods": ["lora", "lora"]}, "methods[1].label 'lora' is taken"),
        ({"methods": [3]}, "methods[0] must be a method's name or a table"),
        ({"ranks": 0}, "s.toml: ranks must be at least 1, not 0"),
        ({"ranks": ["8"]}, "ranks must be a whole number, not a text in quotes"),
        ({"alpha": "rr"}, 'alpha must be "method", "r", "2r" or a number, not "rr"'),
        ({"alpha": "0r"}, "alpha must be"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"confirm_seeds": [1]}, "confirm_seeds must be fresh, but seed 1"),
        ({"epochs": 1}, "steps or epochs must be given, one of them"),
        ({"data": "x.jsonl"}, "task or data must be given"),
        ({"schedule": "cosin"}, "not 'cosin'; did you mean cosine?"),
        ({"dropout": True}, "dropout must be a number, not true or false"),
        ({"baseline": "pissa"}, "baseline 'pissa' is no label of this study"),
        ({"budget": {"trails": 3}}, "budget.trails is not a known key; did you mean trials?"),
        ({"store": "postgresql://me:secret@host/db"}, "store must not hold a password"),
        ({"targets": []}, "targets must not be empty"),
    ],
)
def test_every_mistake_is_one_sentence_with_its_place(changes, sentence):
    message = said(**changes)
    assert sentence in message and "secret" not in message and "\n" not in message


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('task = "synthetic"\nsteps = = 3\n', "line 2, column 9"),
        ('task = "synthetic', "line 1, column 18"),
        ("methods = [\n", "line"),
    ],
)
def test_malformed_toml_names_line_and_column(tmp_path, text, place):
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=place) as caught:
        read_spec(path)
    assert "study.toml" in str(caught.value) and "column" in str(caught.value)


def test_methods_are_looked_up_in_the_catalogue(tmp_path):
    path = tmp_path / "study.toml"
    head = 'task = "synthetic"\nsteps = 1\n'
    for arms, sentence in (
        ('["lora", "pisa"]', r"methods\[1\]: unknown method 'pisa'; did you mean pissa"),
        ('[{name = "lora", settings = {beta = 1}}]', r"methods\[0\]: .*no hyper-parameter 'beta'"),
        ('["lora", {name = "LoRA", label = "x"}]', r"methods\[1\] is the same as 'lora'"),
    ):
        path.write_text(f"{head}methods = {arms}\n")
        with pytest.raises(UserError, match=sentence):
            read_spec(path)
    path.write_text(f'{head}methods = ["LoRA", "lora+"]\nbaseline = "LoRA"\n')
    spec = read_spec(path)
    assert [m.name for m in spec.methods] == ["lora", "lora_plus"] and spec.baseline == "lora"


def test_grid_values_do_not_move_when_it_widens():
    grid = Grid(start=1e-4, stop=1e-2)
    assert grid.points()[:5] == [1e-4, 1.78e-4, 3.16e-4, 5.62e-4, 1e-3] and grid.n == 9
    assert grid.points(-2, 10)[2:-2] == grid.points() == grid.points(0, 8)
    assert Grid(start=1e-4, stop=1e-2, shift=-4).point(4) == grid.point(0)
    listed = Grid(values=(1e-4, 2e-4, 8e-4))
    assert listed.points(-2, 4) == [2.5e-5, 5e-5, 1e-4, 2e-4, 8e-4, 3.2e-3, 1.28e-2]
    assert Grid(values=(1e-3,)).points(-1, 1) == [5.62e-4, 1e-3, 1.78e-3]


def test_the_example_is_complete_and_valid():
    path = Path(__file__).parents[2] / "examples" / "study.toml"
    spec, text = read_spec(path), path.read_text()
    keys = {*spec.to_dict(), "epochs", "store", "data"}
    missing = [key for key in sorted({*keys, "curvature"}) if not re.search(rf"\b{key}\b", text)]
    assert not missing and len(spec.methods) == 7


def test_the_ways_of_curvature_are_those_that_exist():
    assert set(CURVATURE_WAYS) == set(WAYS)
    for value, way in ((True, "exact"), (False, None), ("gauss_newton", "gauss_newton")):
        assert parse({**PLAIN, "curvature": value}, "s.toml").curvature == way
