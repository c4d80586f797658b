"""Forms whose update is whole as it is: alpha has no say."""

from typing import ClassVar

from loralab.recipe import LAYERS, Form


class Unscaled(Form):
    """Base of Forms with s = 1 on layers that take vectors."""

    layers: ClassVar[frozenset[str]] = LAYERS - {"Embedding"}

    def scale(self, alpha: float, rank: int) -> float:
        return 1.0
