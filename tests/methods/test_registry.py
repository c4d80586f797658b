import json
import pkgutil
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import loralab
from loralab import methods
from loralab.citations import citation
from loralab.errors import UserError
from loralab.methods import _registry, all_methods, build, get, register
from loralab.methods._registry import add
from loralab.recipe import Form, Paper, Rule, Schedule, Start


def test_catalogue_is_plain_data_with_the_contract_keys():
    rows = loralab.methods()
    assert json.loads(json.dumps(rows)) == rows
    assert {"name", "axes", "pieces", "paper"} <= set(rows[0])
    assert len(rows) == len(all_methods()) >= 12
    assert {r["name"] for r in loralab.methods(axis="initialization")} == {
        r["name"] for r in rows if "initialization" in r["axes"]
    }


def test_the_catalogue_says_what_a_setting_may_be():
    (row,) = [r for r in loralab.methods() if r["name"] == "lora_plus"]
    assert row["settings"]["rule.beta1"] == 0.9 and row["bounds"]["rule.beta1"] == "in [0, 1)"
    assert row["bounds"].keys() <= row["settings"].keys()


@pytest.mark.parametrize(
    ("question", "inside", "outside"),
    [
        ({"axis": "experts"}, {"hydralora"}, {"lora"}),
        ({"piece": "PiSSA"}, {"pissa", "dude"}, {"qpissa", "lora"}),
        ({"piece": "rule=lora_plus"}, {"lora_plus"}, {"lora"}),
        ({"piece": "init=PiSSA", "axis": "optimization"}, {"dude"}, {"pissa"}),
        ({"mergeable": False}, {"hydralora"}, {"lora", "dora"}),
        ({"mergeable": True}, {"lora", "dora"}, {"hydralora"}),
        ({"needs_data": True}, {"lora_ga", "eva", "autolora"}, {"lora", "pissa"}),
        ({"needs_data": False}, {"lora", "pissa"}, {"lora_ga", "eva", "autolora"}),
        ({"layer": "embedding"}, {"lora"}, {"hydralora"}),
        ({"max_params": 0.5}, {"lora_fa", "vera"}, {"lora", "loha"}),
        ({"max_memory": 1.0}, {"lora", "lora_fa"}, {"loha", "full"}),
    ],
)
def test_the_catalogue_answers_questions(question, inside, outside):
    found = {row["name"] for row in loralab.methods(**question)}
    assert inside <= found and not outside & found


def test_a_question_and_its_opposite_share_out_the_catalogue():
    for what in ("mergeable", "needs_data"):
        yes, no = ({r["name"] for r in loralab.methods(**{what: b})} for b in (True, False))
        assert yes | no == set(all_methods()) and not yes & no
    for row in loralab.methods():
        assert row["mergeable"] in (True, False) and row["layers"]


def test_every_method_file_registers_a_cited_method_of_its_folder():
    files = {
        (info.name.split(".")[-2], info.name.split(".")[-1])
        for info in pkgutil.walk_packages(methods.__path__, "loralab.methods.")
        if not info.ispkg and not info.name.split(".")[-1].startswith("_")
    }
    assert files == {(m.axis, m.name) for m in all_methods().values()}
    for method in all_methods().values():
        paper = method.paper
        assert paper.title and paper.authors and paper.equation and paper.verified
        assert paper.arxiv or paper.venue
        assert method.summary and method.equation and method.traps
    assert len(files) >= 104  # the 103 of the two surveys and the study, and full fine-tuning


def test_a_method_fits_on_a_page_and_its_folder_s_machinery_on_two():
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for path in Path(methods.__path__[0]).glob("*/*.py")
    }
    pages = {path.name: n for path, n in lengths.items() if not path.name.startswith("_")}
    shared = {path.name: n for path, n in lengths.items() if path.name.startswith("_")}
    assert {name: n for name, n in pages.items() if n > 80} == {}
    assert {name: n for name, n in shared.items() if n > 150} == {}


def test_every_method_is_in_the_generated_table_with_its_paper_and_what_verified_it():
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    lines = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert lines.keys() == all_methods().keys()
    listed = set(re.findall(r"\w+", readme))
    for method in all_methods().values():
        line = lines[method.name]
        assert method.paper.arxiv in line and method.paper.verified.replace("|", "\\|") in line
        assert all(f"`{alias}`" in line for alias in method.aliases)
        assert method.name in listed
        assert citation(method).bibtex.startswith(f"@misc{{{method.name}{method.paper.year},")


@pytest.mark.parametrize("spelling", ["LoRA+", "lora-plus", "lora_plus", " Lora_Plus "])
def test_names_are_forgiving(spelling):
    assert get(spelling).name == "lora_plus"


def test_aliases():
    assert get("nzlora").name == "init_ab"
    assert get("none").name == "full"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: get("dorra"), "unknown method 'dorra'; did you mean dora"),
        (lambda: loralab.methods(axis="initialisation"), "did you mean initialization"),
        (lambda: loralab.methods(piece="start=pisa"), "unknown piece start 'pisa'.*PiSSA"),
        (lambda: loralab.methods(piece="strt=pissa"), "unknown kind of piece 'strt'.*start"),
        (lambda: loralab.methods(layer="LSTM"), "one of Conv1D, Conv2d, Embedding, Linear"),
        (lambda: loralab.methods(max_params=-1), "max_params .* must be positive, not -1"),
        (lambda: build("pissa", nitter=2), "'pissa' has no hyper-parameter 'nitter'.*niter"),
        (lambda: build("lora", init="dora"), "'dora' brings no start of its own; these do:.*pissa"),
        (lambda: build("lora", rule=3), "rule must be a Rule or a method's name, not 3"),
        (lambda: build("lora_plus", ratio="big"), "'ratio' .* is a float .*not 'big'"),
        (lambda: build("dora", detach_norm=1), "'detach_norm' .* is a bool"),
        (
            lambda: build("rslora", scaling="alpha/sqr"),
            "scaling of LoRA cannot be 'alpha/sqr'; did",
        ),
        (lambda: build("full", init="pissa"), "start PiSSA needs a form made of one pair A, B"),
        (lambda: build("full", schedule="relora"), "schedule ReLoRA needs a form made of one pair"),
        (lambda: build("full", rule="loft"), "rule LoFT needs a form made of one pair"),
        (lambda: build("full", rule="lora+"), "LoRAPlus treats tensor B apart, and form Dense has"),
        (lambda: build("init_ab", gamma=0), "gamma of InitAB must be positive, not 0.0"),
        (lambda: build("relora", memory="half"), "memory of ReLoRA .* 'prune' or 'zero'"),
        (
            lambda: build("pissa", niter=-1),
            "niter of PiSSA must be a whole number from 0 on, not -1",
        ),
        (lambda: build("lora_ga", split="ArB"), "split of LoRAGA cannot be 'ArB'; did you mean"),
    ],
)
def test_mistakes_get_one_sentence(call, words):
    with pytest.raises(UserError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_pieces_can_be_swapped_by_name_and_by_piece():
    dude = build("dora", init="pissa", niter=4)
    assert dude.form == get("dora").recipe.form
    assert dude.start == type(get("pissa").recipe.start)(niter=4)
    rule = get("lora_plus").recipe.rule
    assert build("pissa", rule="lora+", ratio=8) == build("pissa", rule=type(rule)(ratio=8.0))
    assert build("pissa", start="lora") == get("lora").recipe
    assert loralab.recipe("dora", init="pissa", niter=4) == dude


def test_a_field_that_two_pieces_share_must_say_which():
    @dataclass(frozen=True)
    class WithEps(Start):
        eps: float = 1.0

    with pytest.raises(UserError, match=r"ambiguous; write .start\.eps. or .rule\.eps."):
        build("lora", init=WithEps(), eps=0.5)
    recipe = build("lora", init=WithEps(), **{"init.eps": 0.5, "rule.eps": 1e-6})
    assert (recipe.start.eps, recipe.rule.eps) == (0.5, 1e-6)


def test_recipes_are_hashable_and_of_the_four_kinds():
    for method in all_methods().values():
        kinds = (Form, Start, Rule, Schedule)
        assert all(
            isinstance(p, k) for p, k in zip(method.recipe.pieces.values(), kinds, strict=True)
        )
        assert hash(method.recipe) == hash(build(method.name))


PAGE = """My own.

:summary: Does nothing,
    on two lines
:equation: dW = 0
:title: A title: with a colon
:authors: A. One, B. Two
:source: arXiv 0000.00000, 2026: eq. 1: the first
:verified: nothing
"""


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(_registry, "_METHODS", dict(all_methods()))
    monkeypatch.setattr(_registry, "_NAMES", dict(_registry._NAMES))


def test_register_reads_the_docstring_and_refuses_a_taken_name(own_registry):
    new = register("my-own", "sharing", PAGE, Form())
    assert get("my_own") is new and add(new) is new
    assert (new.summary, new.traps) == ("Does nothing, on two lines", ())
    assert new.paper == Paper(
        title="A title: with a colon",
        authors="A. One, B. Two",
        year=2026,
        arxiv="0000.00000",
        equation="eq. 1: the first",
        verified="nothing",
    )
    with pytest.raises(UserError, match="'none' is taken by 'full'"):
        register("other", "sharing", PAGE, Form(), aliases=("none",))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"name": "My Method!"}, "letters, digits and underscores"),
        ({"axis": "expnsion"}, "unknown axis 'expnsion' of method 'own'; did you mean expansion"),
        ({"form": Form}, "the form of method 'own' is no Form"),
        ({"start": "pissa"}, "the start of method 'own' is no Start, but 'pissa'"),
        ({"aliases": "pq"}, "aliases of method 'own' are a list"),
    ],
)
def test_register_checks_what_it_is_given(own_registry, args, words):
    given = {"name": "own", "axis": "sharing", "doc": PAGE, "form": Form()} | args
    with pytest.raises(UserError, match=words):
        register(**given)


def test_a_name_taken_before_the_catalogue_is_read_is_told_every_time():
    code = """
from loralab.errors import UserError
from loralab.methods import all_methods, register
from loralab.recipe import Form
register("dora", "sharing", None, Form())
for _ in range(2):
    try:
        all_methods()
    except UserError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.stdout.splitlines()
        == ["method name 'dora' is taken by 'dora'; choose another name"] * 2
    ), done.stderr


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (":summary: Does nothing,", "", "one line `:summary: ...`"),
        (":verified: nothing", ":verified: ", "one line `:verified: ...`"),
        (":title: A", ":title: A\n:title: A", "one line `:title: ...`"),
        (":verified: nothing", ":verified: nothing\n:trop: x", "unknown field 'trop'"),
        (", 2026: eq. 1", " (2026), eq. 1", "'arXiv NUMBER, YEAR: formula'"),
    ],
)
def test_a_docstring_that_lacks_a_field_is_refused(own_registry, old, new, words):
    assert old in PAGE
    with pytest.raises(UserError, match=words):
        register("my-own", "sharing", PAGE.replace(old, new), Form())


def test_without_docstrings_methods_work_and_the_catalogue_is_empty(own_registry):
    form = Form()
    new = register("my-own", "sharing", None, form)
    assert (new.summary, new.paper.title) == ("", "") and build("my-own").form is form


def test_a_broken_plug_in_is_skipped_with_a_warning(monkeypatch):
    class Broken:
        name = "broken"

        def load(self):
            raise ImportError("no such module")

    monkeypatch.setattr(_registry, "_walked", False)
    monkeypatch.setattr(_registry, "entry_points", lambda group: [Broken()])
    with pytest.warns(UserWarning, match="plug-in 'broken' was skipped: no such module"):
        assert "lora" in all_methods()
