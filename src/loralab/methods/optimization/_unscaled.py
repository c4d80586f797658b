"""Forms whose update is whole as it is: alpha has no say."""

from typing import ClassVar

from loralab.recipe import LAYERS, Form


class NoAlpha(Form):
    """A Form whose paper has no alpha: s = 1."""

    def scale(self, alpha: float, rank: int) -> float:
        return 1.0


class Unscaled(NoAlpha):
    """Base of Forms with s = 1 on layers that take vectors."""

    layers: ClassVar[frozenset[str]] = LAYERS - {"Embedding"}
