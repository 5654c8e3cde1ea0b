"""The line plots of the report's page. Pure: numbers in, HTML out.

There is no script: what a place in a plot means is told by its ``title``, and every figure also says in words
and in a table what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from kempnerforge.cli.formatting import count
from kempnerforge.cli.report_axes import grid, ticks
from kempnerforge.cli.report_table import row, table
from kempnerforge.goodput.plot import (
    Axis,
    Bucket,
    band_path,
    dots_path,
    downsample,
    line_path,
    linear_axis,
    log_axis,
    number,
)
from kempnerforge.telemetry.curves import Curves

BUCKETS = 800
"""As many as a wide screen can show apart."""
MAX_DOTS = 60
SLABS = 60
ROWS = 12
LOG_FROM = 5.0
"""The highest loss over the lowest one above which the axis is logarithmic."""


@dataclass(frozen=True)
class Series:
    """One metric, ready to draw: what counts, and what does not."""

    name: str
    css: str
    counting: list[Bucket]
    repeated: list[list[Bucket]]
    not_finite: list[tuple[float, float]]
    """Points of what counts."""
    dots: bool = False


def series(name: str, css: str, curves: Curves, key: str, *, dots: bool = False) -> Series:
    """A metric of a run, thinned. Stretches that were done again share the same number of buckets."""
    curve, repeated = curves.counting[key], curves.repeated[key].values()
    total = sum(len(one.steps) for one in repeated)
    shares = [max(2, BUCKETS * len(one.steps) // total) for one in repeated]
    wrong = [(x, y) for x, y in zip(curve.steps, curve.values, strict=True) if not math.isfinite(y)]
    return Series(
        name,
        css,
        downsample(curve.steps, curve.values, buckets=BUCKETS),
        [
            downsample(one.steps, one.values, buckets=share)
            for one, share in zip(repeated, shares, strict=True)
        ],
        wrong,
        dots,
    )


def loss_figure(curves: Curves) -> str:
    """Training and validation loss over steps."""
    found = [
        series("training loss", "effective", curves, "train/loss"),
        series("validation loss", "eval", curves, "eval/loss", dots=True),
    ]
    every = [one for each in found for part in (each.counting, *each.repeated) for one in part]
    low = min((one.low for one in every), default=0.0)
    high = max((one.high for one in every), default=1.0)
    is_log = low > 0 and high / low > LOG_FROM
    axis = log_axis(low, high) if is_log else linear_axis(low, high)
    return figure("loss", "Loss", "loss, on a logarithmic scale" if is_log else "loss", found, axis)


def throughput_figure(curves: Curves) -> str:
    """Tokens per second over steps."""
    found = [series("tokens/s", "effective", curves, "train/tokens_per_s")]
    every = [one for part in (found[0].counting, *found[0].repeated) for one in part]
    high = max((one.high for one in every), default=1.0)
    return figure("throughput", "Throughput", "tokens/s", found, linear_axis(0, high * 1.05 or 1.0, margin=0))


def figure(name: str, title: str, unit: str, found: Sequence[Series], y: Axis) -> str:
    """One figure with its words, legend, plot and table; a sentence where there is nothing to show."""
    steps = [
        x
        for one in found
        for x in (
            *_ends(one.counting),
            *(x for part in one.repeated for x in _ends(part)),
            *_first(one.not_finite),
        )
    ]
    head = f'<figure id="{name}" class="card"><figcaption><h2>{title}</h2>'
    if not steps:
        return f'{head}<p class="words">No row of it has been logged yet.</p></figcaption></figure>'
    x = linear_axis(min(steps), max(steps), ticks=6, margin=0, least=1)
    words = escape(_words(found))
    shapes = [grid(y), *(_repeated(one, x, y) for one in found), *(_counting(one, x, y) for one in found)]
    shapes += [
        f'<rect class="slab" x="{1000 * x.place(low):.1f}" y="0" width="{1000 / SLABS:.1f}" height="1000">'
        f"<title>{escape(_told(found, low, high, cells))}</title></rect>"
        for low, high, cells in _slab_rows(found, x, SLABS)
    ]
    return (
        f'{head}<p class="words">{words}</p></figcaption>{_legend(found)}<p class="unit">{unit}</p>'
        f'<div class="area"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{title} over steps. {words}">{"".join(shapes)}</svg>'
        f"{_bad_marks(found, x)}{ticks(x, y)}</div>"
        f'<p class="unit below">step</p>{_table(title, found, _slab_rows(found, x, ROWS))}</figure>'
    )


def _is_thinned(*parts: Sequence[Bucket]) -> bool:
    """Whether a bucket holds more than one value."""
    return any(one.low < one.high for part in parts for one in part)


def _ends(part: Sequence[Bucket]) -> list[float]:
    return [part[0].first, part[-1].last] if part else []


def _first(points: Sequence[tuple[float, float]]) -> list[float]:
    return [points[0][0], points[-1][0]] if points else []


def _words(found: Sequence[Series]) -> str:
    said: list[str] = []
    for one in found:
        values = one.counting
        if values:
            low, high = min(values, key=lambda each: each.low), max(values, key=lambda each: each.high)
            ends = f"{_short(values[0].mean)} at step {values[0].first:,.0f} to {_short(values[-1].mean)}"
            said.append(
                f"{one.name} from {ends} at step {values[-1].last:,.0f}; lowest {_short(low.low)} near step "
                f"{low.middle:,.0f}, highest {_short(high.high)} near step {high.middle:,.0f}."
            )
        if one.not_finite:
            said.append(f"{count(len(one.not_finite), 'step')} had a {one.name} that is not finite.")
    if _is_thinned(*(one.counting for one in found)):
        said.append(
            "The line is the mean of neighbouring steps, the band around it their lowest to highest value."
        )
    return " ".join(text[0].upper() + text[1:] for text in said)


def _legend(found: Sequence[Series]) -> str:
    keys = [
        f'<li><i class="key {"dot" if one.dots else "line"} c-{one.css}"></i>{one.name}</li>'
        for one in found
        if one.counting
    ]
    if any(one.repeated for one in found):
        keys.append('<li><i class="key halo c-lost"></i>lost: done again, or rolled back</li>')
    if any(one.not_finite for one in found):
        keys.append('<li><i class="bad" aria-hidden="true">✕</i>not finite</li>')
    return f'<ul class="legend">{"".join(keys)}</ul>'


def _repeated(one: Series, x: Axis, y: Axis) -> str:
    """Wide and pale, since a loss that was repeated lies under the one that counts, bit for bit.

    Narrow where it is thinned: then it goes to and fro between extremes.
    """
    paths = []
    for part in one.repeated:
        points = [(x.place(each.middle), y.place(value)) for each in part for value in _extremes(each)]
        if points:
            paths.append(line_path(points) if len(points) > 1 else dots_path(points))
    css = "halo thinned" if _is_thinned(*one.repeated) else "halo"
    return f'<path class="{css}" d="{"".join(paths)}"/>' if paths else ""


def _extremes(each: Bucket) -> tuple[float, ...]:
    return (each.low, each.high) if each.low < each.high else (each.low,)


def _counting(one: Series, x: Axis, y: Axis) -> str:
    if not one.counting:
        return ""
    means = [(x.place(each.middle), y.place(each.mean)) for each in one.counting]
    has_dots = len(means) == 1 or (one.dots and len(means) <= MAX_DOTS)
    band = ""
    if _is_thinned(one.counting):
        edges = [(x.place(each.middle), y.place(each.low), y.place(each.high)) for each in one.counting]
        band = f'<path class="band c-{one.css}" d="{band_path(edges)}"/>'
    dots = f'<path class="dots c-{one.css}" d="{dots_path(means)}"/>' if has_dots else ""
    return f'{band}<path class="line c-{one.css}" d="{line_path(means)}"/>{dots}'


def _bad_marks(found: Sequence[Series], x: Axis) -> str:
    """A cross at the top for steps that were not finite, one for each place that can be told apart."""
    places: dict[int, list[tuple[float, float, str]]] = {}
    for one in found:
        for step, value in one.not_finite:
            places.setdefault(int(100 * x.place(step)), []).append((step, value, one.name))
    marks = []
    for group in places.values():
        step, value, name = group[0]
        told = f"step {step:,.0f}: {name} {value}" + (
            f", and {len(group) - 1} more" if len(group) > 1 else ""
        )
        left = 100 * x.place(step)
        marks.append(f'<i class="bad mark" style="left:{left:.2f}%" title="{escape(told)}">✕</i>')
    return "".join(marks)


Cells = list[tuple[float, float, float] | None]
"""Lowest, mean and highest of each series."""


def _slab_rows(found: Sequence[Series], x: Axis, count: int) -> list[tuple[float, float, Cells]]:
    """The plot in ``count`` parts, from the left: first and last step, what is in there. No empty ones."""
    width = (x.high - x.low) / count
    columns: list[dict[int, list[Bucket]]] = []
    for one in found:
        column: dict[int, list[Bucket]] = {}
        for each in one.counting:
            column.setdefault(min(int((each.middle - x.low) / width), count - 1), []).append(each)
        columns.append(column)
    rows: list[tuple[float, float, Cells]] = []
    for place in sorted({place for column in columns for place in column}):
        cells: Cells = []
        for column in columns:
            group = column.get(place)
            if group is None:
                cells.append(None)
                continue
            mean = sum(each.mean for each in group) / len(group)
            cells.append((min(each.low for each in group), mean, max(each.high for each in group)))
        rows.append((x.low + place * width, x.low + (place + 1) * width, cells))
    return rows


def _told(found: Sequence[Series], low: float, high: float, cells: Cells) -> str:
    said = [f"{one.name} {_range(cell)}" for one, cell in zip(found, cells, strict=True) if cell is not None]
    return f"{_steps(low, high)}: {', '.join(said)}"


def _steps(low: float, high: float) -> str:
    first, last = math.ceil(low), max(math.ceil(low), math.ceil(high) - 1)
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def _range(cell: tuple[float, float, float]) -> str:
    low, mean, high = cell
    return _short(mean) if low == high else f"{_short(mean)} ({_short(low)} to {_short(high)})"


def _table(title: str, found: Sequence[Series], rows: Sequence[tuple[float, float, Cells]]) -> str:
    body = [
        row(_steps(low, high), *(_range(cell) if cell is not None else "" for cell in cells))
        for low, high, cells in rows
    ]
    return (
        f"<details><summary>{title} as a table: mean (lowest to highest)</summary>"
        f"{table(['steps', *(one.name for one in found)], body)}</details>"
    )


def _short(value: float) -> str:
    size = abs(value)
    return number(value, size / 100) if size >= 1e4 else f"{value:.4g}"
