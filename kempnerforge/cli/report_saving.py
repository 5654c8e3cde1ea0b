"""The checkpoint section of the report page: timings of saves, and the cost of save intervals."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from kempnerforge.cli import report_text
from kempnerforge.cli.formatting import count
from kempnerforge.cli.report_axes import grid, ticks
from kempnerforge.cli.report_table import row, table
from kempnerforge.goodput.interval import expected_overhead
from kempnerforge.goodput.plot import dots_path, duration, line_path, linear_axis, log_time_axis

POINTS = 100


def saving_section(saving: Mapping[str, Any]) -> str:
    """Return timings, intervals and the cost model. ``saving`` is the result of ``accounting.saving``."""
    timings = [
        row(report_text.TIMINGS[name], duration(timing["p50"]), duration(timing["p99"]))
        for name, timing in saving["timings"].items()
        if timing["p50"] is not None
    ]
    intervals = [
        row(name, duration(saving[key]) if saving[key] is not None else "unknown")
        for key, name in report_text.INTERVALS.items()
    ]
    notes = "".join(f'<p class="words">{escape(line)}</p>' for line in report_text.saving_lines(saving))
    return (
        '<section id="saving" class="card"><h2>Checkpoints</h2>'
        f'<p class="words">{count(saving["commits"], "commit")}.</p>'
        f"{table(('phase of a save', 'p50', 'p99'), timings) if timings else ''}"
        f"{table(('time between saves', ''), intervals)}{notes}{_model(saving)}</section>"
    )


def _model(saving: Mapping[str, Any]) -> str:
    """Plot the expected overhead over the interval, and mark the measured and the best interval."""
    expected, measured_s = saving["expected"], saving["interval_s"]
    if expected is None or not measured_s:
        return ""
    best_s = expected["best_interval_s"]
    costs = {name: expected[name] for name in ("stall_s", "mtti_s", "lag_s", "restart_s")}
    low_s, high_s = min(measured_s, best_s) / 4, max(measured_s, best_s) * 4
    x = log_time_axis(low_s, high_s)
    intervals_s = [low_s * (high_s / low_s) ** (point / (POINTS - 1)) for point in range(POINTS)]
    percents = [100 * expected_overhead(interval_s, **costs) for interval_s in intervals_s]
    y = linear_axis(0, 1.05 * max(percents), ticks=4, margin=0)
    line = line_path(
        [
            (x.place(interval_s), y.place(percent))
            for interval_s, percent in zip(intervals_s, percents, strict=True)
        ]
    )
    measured, best = 100 * expected["overhead"], 100 * expected["best_overhead"]
    dots = "".join(
        f'<path class="dots c-{css}" d="{dots_path([(x.place(interval_s), y.place(percent))])}"/>'
        for css, interval_s, percent in (("measured", measured_s, measured), ("best", best_s, best))
    )
    words = f"Expected overhead: {measured:.1f}% at the measured interval, {best:.1f}% at the best one."
    return (
        '<ul class="legend"><li><i class="key dot c-measured"></i>measured interval</li>'
        '<li><i class="key dot c-best"></i>best interval</li></ul>'
        '<p class="unit">expected overhead, % of the time</p><div class="area low">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{words}">'
        f'{grid(y)}<path class="line c-effective" d="{line}"/>{dots}</svg>{ticks(x, y)}</div>'
        '<p class="unit below">time between saves</p>'
    )
