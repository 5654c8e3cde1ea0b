"""Grid and labels of the plots on the report page.

Lines are SVG, stretched to the width of the page with strokes of constant width. Labels are HTML
next to the SVG, so that they have the same size on a phone.
"""

from __future__ import annotations

from kempnerforge.goodput.plot import Axis


def grid(y: Axis) -> str:
    """Return horizontal lines across the plot, one per tick."""
    lines = "".join(f"M0 {1000 * (1 - y.place(value)):.1f}H1000" for value, _ in y.ticks)
    return f'<path class="grid" d="{lines}"/>'


def ticks(x: Axis, y: Axis) -> str:
    """Return the labels of both axes, placed next to the plot."""
    across = [
        f'<span class="xtick" style="left:{100 * x.place(value):.2f}%">{label}</span>'
        for value, label in x.ticks
    ]
    up = [
        f'<span class="ytick" style="top:{100 - 100 * y.place(value):.2f}%">{label}</span>'
        for value, label in y.ticks
    ]
    return f'<div aria-hidden="true">{"".join([*across, *up])}</div>'
