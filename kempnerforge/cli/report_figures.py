"""The line plots of the report page, as HTML and SVG.

The page has no scripts. Values are shown by ``title`` attributes on invisible slabs, which are
vertical strips of the plot. Every figure also has a summary in words and a table.
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
"""Maximum number of buckets of a line: as many as a wide screen can resolve."""
MAX_DOTS = 60
SLABS = 60
ROWS = 12
LOG_FROM = 5.0
"""Use a logarithmic axis if the highest loss divided by the lowest one is larger than this."""


@dataclass(frozen=True)
class Series:
    """One downsampled metric: the values on the final timeline, and those of lost steps."""

    name: str
    css: str
    counting: list[Bucket]
    repeated: list[list[Bucket]]
    not_finite: list[tuple[float, float]]
    """Non-finite points of the final timeline."""
    dots: bool = False


def series(name: str, css: str, curves: Curves, key: str, *, dots: bool = False) -> Series:
    """Downsample a metric of a run. All lost segments together have the same number of buckets."""
    curve, repeated = curves.counting[key], curves.repeated[key].values()
    total = sum(len(lost.steps) for lost in repeated)
    shares = [max(2, BUCKETS * len(lost.steps) // total) for lost in repeated]
    wrong = [(x, y) for x, y in zip(curve.steps, curve.values, strict=True) if not math.isfinite(y)]
    return Series(
        name,
        css,
        downsample(curve.steps, curve.values, buckets=BUCKETS),
        [
            downsample(lost.steps, lost.values, buckets=share)
            for lost, share in zip(repeated, shares, strict=True)
        ],
        wrong,
        dots,
    )


def loss_figure(curves: Curves) -> str:
    """Return the figure of training and validation loss over steps."""
    plotted = [
        series("training loss", "effective", curves, "train/loss"),
        series("validation loss", "eval", curves, "eval/loss", dots=True),
    ]
    buckets = [bucket for line in plotted for part in (line.counting, *line.repeated) for bucket in part]
    low = min((bucket.low for bucket in buckets), default=0.0)
    high = max((bucket.high for bucket in buckets), default=1.0)
    is_log = low > 0 and high / low > LOG_FROM
    axis = log_axis(low, high) if is_log else linear_axis(low, high)
    return figure("loss", "Loss", "loss, logarithmic scale" if is_log else "loss", plotted, axis)


def throughput_figure(curves: Curves) -> str:
    """Return the figure of tokens per second over steps."""
    return metric_figure(curves, "train/tokens_per_s", "Throughput", "tokens/s", name="throughput")


def metric_figure(curves: Curves, key: str, title: str, unit: str, *, name: str = "") -> str:
    """Return the figure of one metric over steps, with zero on its axis. ``name`` is its HTML id."""
    line = series(unit, "effective", curves, key)
    buckets = [bucket for part in (line.counting, *line.repeated) for bucket in part]
    high = max((bucket.high for bucket in buckets), default=1.0)
    axis = linear_axis(0, high * 1.05 or 1.0, margin=0)
    return figure(name or key.rpartition("/")[2], title, unit, [line], axis)


def mfu_figure(curves: Curves) -> str:
    """Return the figure of the model FLOPs utilization; nothing where it is not known, as on a CPU."""
    is_known = curves.counting["train/mfu"].steps or curves.repeated["train/mfu"]
    return metric_figure(curves, "train/mfu", "MFU", "MFU, 1 = peak") if is_known else ""


def figure(name: str, title: str, unit: str, plotted: Sequence[Series], y: Axis) -> str:
    """Return a figure with summary, legend, plot and table, or a sentence if there are no values."""
    steps = [
        x
        for line in plotted
        for x in (
            *_ends(line.counting),
            *(x for part in line.repeated for x in _ends(part)),
            *_first(line.not_finite),
        )
    ]
    head = f'<figure id="{name}" class="card"><figcaption><h2>{title}</h2>'
    if not steps:
        return f'{head}<p class="words">No values have been logged yet.</p></figcaption></figure>'
    x = linear_axis(min(steps), max(steps), ticks=6, margin=0, least=1)
    words = escape(_words(plotted))
    shapes = [
        grid(y),
        *(_repeated(line, x, y) for line in plotted),
        *(_counting(line, x, y) for line in plotted),
    ]
    shapes += [
        f'<rect class="slab" x="{1000 * x.place(low):.1f}" y="0" width="{1000 / SLABS:.1f}" height="1000">'
        f"<title>{escape(_slab_title(plotted, low, high, cells))}</title></rect>"
        for low, high, cells in _slab_rows(plotted, x, SLABS)
    ]
    return (
        f'{head}<p class="words">{words}</p></figcaption>{_legend(plotted)}<p class="unit">{unit}</p>'
        f'<div class="area"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{title} over steps. {words}">{"".join(shapes)}</svg>'
        f"{_bad_marks(plotted, x)}{ticks(x, y)}</div>"
        f'<p class="unit below">step</p>{_table(title, plotted, _slab_rows(plotted, x, ROWS))}</figure>'
    )


def _is_downsampled(*parts: Sequence[Bucket]) -> bool:
    """Return whether a bucket holds more than one value."""
    return any(bucket.low < bucket.high for part in parts for bucket in part)


def _ends(part: Sequence[Bucket]) -> list[float]:
    return [part[0].first, part[-1].last] if part else []


def _first(points: Sequence[tuple[float, float]]) -> list[float]:
    return [points[0][0], points[-1][0]] if points else []


def _words(plotted: Sequence[Series]) -> str:
    sentences: list[str] = []
    for line in plotted:
        values = line.counting
        if values:
            low = min(values, key=lambda bucket: bucket.low)
            high = max(values, key=lambda bucket: bucket.high)
            ends = f"{_short(values[0].mean)} at step {values[0].first:,.0f} to {_short(values[-1].mean)}"
            sentences.append(
                f"{line.name} from {ends} at step {values[-1].last:,.0f}; lowest {_short(low.low)} near step "
                f"{low.middle:,.0f}, highest {_short(high.high)} near step {high.middle:,.0f}."
            )
        if line.not_finite:
            sentences.append(f"{count(len(line.not_finite), 'step')} had a {line.name} that is not finite.")
    if _is_downsampled(*(line.counting for line in plotted)):
        sentences.append("The line is the mean of neighbouring steps, the band their range.")
    return " ".join(text[0].upper() + text[1:] for text in sentences)


def _legend(plotted: Sequence[Series]) -> str:
    keys = [
        f'<li><i class="key {"dot" if line.dots else "line"} c-{line.css}"></i>{line.name}</li>'
        for line in plotted
        if line.counting
    ]
    if any(line.repeated for line in plotted):
        keys.append('<li><i class="key halo c-lost"></i>lost: repeated or rolled back</li>')
    if any(line.not_finite for line in plotted):
        keys.append('<li><i class="bad" aria-hidden="true">✕</i>not finite</li>')
    return f'<ul class="legend">{"".join(keys)}</ul>'


def _repeated(line: Series, x: Axis, y: Axis) -> str:
    """Draw lost steps wide and pale, so that they show behind a final value that is bitwise equal.

    Draw them narrow if they are downsampled, because the path then alternates between extremes.
    """
    paths = []
    for part in line.repeated:
        points = [(x.place(bucket.middle), y.place(value)) for bucket in part for value in _extremes(bucket)]
        if points:
            paths.append(line_path(points) if len(points) > 1 else dots_path(points))
    css = "halo thinned" if _is_downsampled(*line.repeated) else "halo"
    return f'<path class="{css}" d="{"".join(paths)}"/>' if paths else ""


def _extremes(bucket: Bucket) -> tuple[float, ...]:
    return (bucket.low, bucket.high) if bucket.low < bucket.high else (bucket.low,)


def _counting(line: Series, x: Axis, y: Axis) -> str:
    if not line.counting:
        return ""
    means = [(x.place(bucket.middle), y.place(bucket.mean)) for bucket in line.counting]
    has_dots = len(means) == 1 or (line.dots and len(means) <= MAX_DOTS)
    band = ""
    if _is_downsampled(line.counting):
        edges = [
            (x.place(bucket.middle), y.place(bucket.low), y.place(bucket.high)) for bucket in line.counting
        ]
        band = f'<path class="band c-{line.css}" d="{band_path(edges)}"/>'
    dots = f'<path class="dots c-{line.css}" d="{dots_path(means)}"/>' if has_dots else ""
    return f'{band}<path class="line c-{line.css}" d="{line_path(means)}"/>{dots}'


def _bad_marks(plotted: Sequence[Series], x: Axis) -> str:
    """Draw a cross at the top for steps that were not finite, one per percent of the width."""
    groups: dict[int, list[tuple[float, float, str]]] = {}
    for line in plotted:
        for step, value in line.not_finite:
            groups.setdefault(int(100 * x.place(step)), []).append((step, value, line.name))
    marks = []
    for group in groups.values():
        step, value, name = group[0]
        title = f"step {step:,.0f}: {name} {value}" + (
            f", and {len(group) - 1} more" if len(group) > 1 else ""
        )
        left = 100 * x.place(step)
        marks.append(f'<i class="bad mark" style="left:{left:.2f}%" title="{escape(title)}">✕</i>')
    return "".join(marks)


Cells = list[tuple[float, float, float] | None]
"""Lowest, mean and highest value of each series."""


def _slab_rows(plotted: Sequence[Series], x: Axis, count: int) -> list[tuple[float, float, Cells]]:
    """Divide the plot into ``count`` slabs. Return first step, end and cells of each nonempty slab."""
    width = (x.high - x.low) / count
    columns: list[dict[int, list[Bucket]]] = []
    for line in plotted:
        column: dict[int, list[Bucket]] = {}
        for bucket in line.counting:
            column.setdefault(min(int((bucket.middle - x.low) / width), count - 1), []).append(bucket)
        columns.append(column)
    rows: list[tuple[float, float, Cells]] = []
    for slab in sorted({slab for column in columns for slab in column}):
        cells: Cells = []
        for column in columns:
            group = column.get(slab)
            if group is None:
                cells.append(None)
                continue
            mean = sum(bucket.mean for bucket in group) / len(group)
            cells.append((min(bucket.low for bucket in group), mean, max(bucket.high for bucket in group)))
        rows.append((x.low + slab * width, x.low + (slab + 1) * width, cells))
    return rows


def _slab_title(plotted: Sequence[Series], low: float, high: float, cells: Cells) -> str:
    values = [
        f"{line.name} {_range(cell)}" for line, cell in zip(plotted, cells, strict=True) if cell is not None
    ]
    return f"{_steps(low, high)}: {', '.join(values)}"


def _steps(low: float, high: float) -> str:
    first, last = math.ceil(low), max(math.ceil(low), math.ceil(high) - 1)
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def _range(cell: tuple[float, float, float]) -> str:
    low, mean, high = cell
    return _short(mean) if low == high else f"{_short(mean)} ({_short(low)} to {_short(high)})"


def _table(title: str, plotted: Sequence[Series], rows: Sequence[tuple[float, float, Cells]]) -> str:
    body = [
        row(_steps(low, high), *(_range(cell) if cell is not None else "" for cell in cells))
        for low, high, cells in rows
    ]
    return (
        f"<details><summary>{title} as a table: mean (lowest to highest)</summary>"
        f"{table(['steps', *(line.name for line in plotted)], body)}</details>"
    )


def _short(value: float) -> str:
    size = abs(value)
    return number(value, size / 100) if size >= 1e4 else f"{value:.4g}"
