"""A learning-rate curve the size of a word, for a table row."""

import math

from markupsafe import Markup, escape

from loralab.report.data import Arm, Group, ReportData
from loralab.report.palette import INK, styles

WIDTH, HEIGHT, PAD = 120, 30, 4


def sparkline(data: ReportData, group: Group, arm: Arm) -> Markup:
    """Return an inline SVG: the arm's curve over the baseline's, all rows on the same axes."""
    points = [p for a in group.arms for p in a.curve]
    values = [p.mean for p in points if math.isfinite(p.mean)]
    if not values:
        return Markup("")
    x0, x1 = math.log(min(p.lr for p in points)), math.log(max(p.lr for p in points))
    y0, y1 = min(values), max(values)

    def place(lr: float, value: float) -> str:
        x = PAD + (WIDTH - 2 * PAD) * (math.log(lr) - x0) / ((x1 - x0) or 1)
        y = HEIGHT - PAD - (HEIGHT - 2 * PAD) * (value - y0) / ((y1 - y0) or 1)
        return f"{x:.1f},{y:.1f}"

    def line(of: Arm, colour: str, width: float) -> str:
        path = " ".join(place(p.lr, p.mean) for p in of.curve if math.isfinite(p.mean))
        return (
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" '
            'stroke-linejoin="round"/>'
        )

    colour = styles(data.labels, data.baseline)[arm.label].colour
    colour = "var(--ink)" if colour == INK else colour
    parts = []
    if group.baseline is not None and not arm.is_baseline:
        parts.append(line(group.baseline, "var(--faint)", 1.5))
    parts.append(line(arm, colour, 2))
    title = escape(f"learning-rate curve of {arm.label}; grey: {data.baseline}")
    return Markup(
        f'<svg class="spark" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img"><title>{title}</title>{"".join(parts)}</svg>'
    )
