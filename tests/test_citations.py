"""Who gets cited for what, and BibTeX that a bibliography program reads."""

import re

import pytest

from loralab.catalogue import Paper
from loralab.citations import Citation, citation, citations, methods_of, used_by
from loralab.methods import all_methods
from loralab.study.trial import Trial


@pytest.mark.parametrize(
    ("method", "swaps", "cited"),
    [
        ("lora", {}, ["lora"]),
        ("pissa", {}, ["pissa"]),
        ("dora", {"start": "pissa"}, ["dora", "pissa"]),
        ("pissa", {"form": "dora", "rule": "lora+"}, ["pissa", "dora", "lora_plus"]),
        ("pissa", {"init": "milora"}, ["milora"]),  # nothing of PiSSA is left
        ("lora", {"start": "pissa"}, ["lora", "pissa"]),
        ("lora", {"form": "dora"}, ["dora"]),
        ("dora", {"form": "lora"}, ["lora"]),
    ],
)
def test_each_piece_cites_the_method_it_is_from(method, swaps, cited):
    assert methods_of(method, swaps) == cited


def test_a_study_cites_each_paper_once_and_says_what_it_does_not_know():
    trials = [
        Trial("m", "t", name, 1e-3, swaps=swaps)
        for name, swaps in [("qpissa", {}), ("dora", {"start": "pissa"}), ("elsewhere", {})]
    ]
    found, unknown = used_by(trials * 2)
    assert [(c.paper.arxiv, c.methods) for c in found] == [
        ("2402.09353", ("dora",)),
        ("2404.02948", ("pissa", "qpissa")),
    ]
    assert unknown == ["elsewhere"]


def test_bibtex_is_balanced_and_escaped():
    paper = Paper("50 % of A & B_1", "A. Müller, B. C. Li et al.", 2026, venue="OpenReview x_1")
    text = Citation(paper, ("new",)).bibtex
    assert "title = {{50 \\% of A \\& B\\_1}}" in text
    assert "author = {A. Müller and B. C. Li and others}" in text
    assert "note = {OpenReview x\\_1}" in text and "eprint" not in text
    for entry in citations(all_methods()):
        assert entry.bibtex.count("{") == entry.bibtex.count("}")
        assert not re.search(r"(?<!\\)[&%$#_]", entry.bibtex.split("\n", 1)[1])
        assert entry.source and len(entry.paper.authors) > 3
    keys = [entry.key for entry in citations(all_methods())]
    papers = {(m.paper.title, m.paper.arxiv) for m in all_methods().values()}
    assert len(set(keys)) == len(keys) == len(papers) < len(all_methods())  # some have two methods
    assert citation(all_methods()["lora"]).url == "https://arxiv.org/abs/2106.09685"
