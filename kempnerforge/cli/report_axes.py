"""Grid and labels of the plots on the report's page. Pure.

Lines are SVG that is stretched to the width of the page, with strokes that are not; what is written stands
beside them as HTML, so it has the same size on a telephone.
"""

from __future__ import annotations

from kempnerforge.goodput.plot import Axis


def grid(y: Axis) -> str:
    """Lines across the drawing, one a tick."""
    lines = "".join(f"M0 {1000 * (1 - y.place(value)):.1f}H1000" for value, _ in y.ticks)
    return f'<path class="grid" d="{lines}"/>'


def ticks(x: Axis, y: Axis) -> str:
    """The labels of both axes, beside the drawing."""
    across = [
        f'<span class="xtick" style="left:{100 * x.place(value):.2f}%">{label}</span>'
        for value, label in x.ticks
    ]
    up = [
        f'<span class="ytick" style="top:{100 - 100 * y.place(value):.2f}%">{label}</span>'
        for value, label in y.ticks
    ]
    return f'<div aria-hidden="true">{"".join([*across, *up])}</div>'
