"""Hyper-parameters say in their types what they may be."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from loralab.bounds import Count, Decay, OneOf, Positive, Share, bound_words, check_fields
from loralab.errors import UserError
from loralab.methods import all_methods

TABLE = {"sum": sum, "max": max}


@dataclass(frozen=True)
class Piece:
    lr: Positive = 1.0
    beta: Decay = 0.9
    n: Count | None = None
    share: Share = 0.5
    how: Annotated[str, OneOf(TABLE)] = "sum"
    side: Literal["left", "right"] = "left"
    variant: Literal[1, 2] = 1
    free: float = -1.0

    def __post_init__(self):
        check_fields(self)


@pytest.mark.parametrize(
    "settings",
    [{}, {"lr": 1}, {"beta": 0.0}, {"n": 3}, {"share": 1.0}, {"how": "max"}, {"variant": 2}],
)
def test_what_the_types_allow_passes(settings):
    assert Piece(**settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lr": 0.0}, "lr of Piece must be positive, not 0.0"),
        ({"lr": float("inf")}, "lr of Piece must be positive, not inf"),
        ({"lr": float("nan")}, "lr of Piece must be positive, not nan"),
        ({"lr": None}, "lr of Piece must be positive, not None"),
        ({"lr": "1"}, "lr of Piece must be positive, not '1'"),
        ({"lr": True}, "lr of Piece must be positive, not True"),
        ({"beta": 1.0}, "beta of Piece must be in [0, 1), not 1.0"),
        ({"n": 0}, "n of Piece must be a whole number from 1 on, not 0"),
        ({"n": 1.5}, "n of Piece must be a whole number from 1 on, not 1.5"),
        ({"share": 1.1}, "share of Piece must be a share, in [0, 1], not 1.1"),
        ({"how": "summ"}, "how of Piece cannot be 'summ'; did you mean sum?"),
        ({"how": "xyz"}, "how of Piece cannot be 'xyz'; it is 'sum' or 'max'"),
        ({"side": 3}, "side of Piece cannot be 3; it is 'left' or 'right'"),
        ({"variant": 3}, "variant of Piece cannot be 3; it is 1 or 2"),
    ],
)
def test_what_they_do_not_allow_gets_one_sentence(settings, sentence):
    with pytest.raises(UserError) as caught:
        Piece(**settings)
    assert str(caught.value) == sentence


def test_the_words_of_a_bound():
    words = [bound_words(Piece(), name) for name in ("lr", "n", "how", "side", "free")]
    assert words == [
        "positive", "a whole number from 1 on; None", "'sum' or 'max'", "'left' or 'right'", ""
    ]  # fmt: skip


def test_every_number_of_the_catalogue_has_a_bound():
    """A bare float or int would take NaN, a negative rank, anything."""
    bare = {
        f"{type(piece).__name__}.{name}"
        for method in all_methods().values()
        for piece in method.recipe.pieces.values()
        for name, kind in type(piece).__annotations__.items()
        if kind in (int, float, int | None, float | None)
    }
    assert bare == set()
