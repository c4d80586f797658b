"""One colour, dash and marker per method, the same in every figure; the baseline is ink.

Colours: Okabe and Ito (2008) without yellow and black, plus a purple and an olive, all legible on
white and on near-black. From the ninth method on colours repeat with another dash, so dash and
marker tell apart what colour alone does not.
"""

from dataclasses import dataclass

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8C6BB1",
    "#8A8F2A",
)
DASHES = ("solid", "dash", "dot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "triangle-down")
MATPLOTLIB = {
    "solid": "-",
    "dash": "--",
    "dot": ":",
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "triangle-down": "v",
}
INK = "@ink"  # replaced by the theme's text colour where it is drawn


@dataclass(frozen=True)
class Style:
    """How a method is drawn; `colour` is a hex colour or INK."""

    colour: str
    dash: str
    marker: str
    width: float


def styles(labels: tuple[str, ...], baseline: str) -> dict[str, Style]:
    """Return a style per label; it depends on the order of labels alone, so keep that stable."""
    out = {}
    others = [label for label in labels if label != baseline]
    for i, label in enumerate(others):
        dash = DASHES[i // len(COLOURS) % len(DASHES)]
        out[label] = Style(COLOURS[i % len(COLOURS)], dash, MARKERS[i % len(MARKERS)], 1.8)
    out[baseline] = Style(INK, "solid", "circle", 3.0)
    return out
