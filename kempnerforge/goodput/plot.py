"""The geometry of plots: ticks, scales, downsampled series and paths, independent of HTML."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86400.0
_UNITS = (("d", _DAY), ("h", _HOUR), ("min", _MINUTE), ("s", 1.0), ("ms", 1e-3))
_TIME_STEPS = (
    *(mantissa * 10.0**power for power in (-3, -2, -1) for mantissa in (1, 2, 5)),
    *(1, 2, 5, 10, 15, 30),
    *(minutes * _MINUTE for minutes in (1, 2, 5, 10, 15, 30)),
    *(hours * _HOUR for hours in (1, 2, 3, 6, 12)),
    *(days * _DAY for days in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)),
)
_SHORT_TIMES = (
    *(1e-3, 1e-2, 0.1, 0.3, 1, 3, 10, 30),
    *(
        _MINUTE,
        3 * _MINUTE,
        10 * _MINUTE,
        30 * _MINUTE,
        _HOUR,
        3 * _HOUR,
        12 * _HOUR,
        _DAY,
        3 * _DAY,
        10 * _DAY,
    ),
)


@dataclass(frozen=True)
class Axis:
    """An axis from ``low`` to ``high``, with ticks of (value, label)."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return the position of a value: 0 at ``low``, 1 at ``high``."""
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        at = math.log(value) if self.is_log else value
        return (at - low) / (high - low)


def linear_axis(low: float, high: float, *, ticks: int = 5, margin: float = 0.04, least: float = 0.0) -> Axis:
    """Return a linear axis that contains ``low`` to ``high``, with at most ``ticks`` ticks at round values.

    ``margin`` is the space beyond both ends, as a fraction of the range. An empty range is widened.
    ``least`` is the minimum distance of ticks, for example 1 for whole numbers.
    """
    space = (high - low) * margin if high > low else abs(high) / 2 or 0.5
    low, high = low - space, high + space
    width = next(
        step
        for step in _mantissas(max(least, (high - low) / ticks))
        if (high - low) / step <= ticks and step >= least
    )
    first = math.ceil(low / width - 1e-9)
    count = math.floor(high / width + 1e-9) - first + 1
    values = [(first + index) * width for index in range(count)]
    return Axis(low, high, tuple((value, number(value, width)) for value in values))


def log_axis(low: float, high: float, *, ticks: int = 6) -> Axis:
    """Return a logarithmic axis that contains ``low`` to ``high``, both above 0."""
    space = (high / low) ** 0.04 if high > low else 2.0
    low, high = low / space, high * space
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values: list[float] = []
    for mantissas in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1,)):
        values = [m * 10.0**power for power in decades for m in mantissas if low <= m * 10.0**power <= high]
        if len(values) <= ticks:
            break
    values = values[:: -(-len(values) // ticks) or 1]
    return Axis(low, high, tuple((value, number(value, value)) for value in values), is_log=True)


def time_axis(seconds: float, *, ticks: int = 6) -> Axis:
    """Return an axis from 0 to ``seconds``, with at most ``ticks`` ticks after 0 at round times."""
    high = max(seconds, 1e-3)
    width = next((step for step in _TIME_STEPS if high / step <= ticks), _TIME_STEPS[-1])
    values = [index * width for index in range(int(high / width + 1e-9) + 1)]
    unit, scale = next((unit for unit in _UNITS if width >= unit[1]), _UNITS[-1])
    return Axis(0.0, high, tuple((value, f"{value / scale:g} {unit}" if value else "0") for value in values))


def log_time_axis(low_s: float, high_s: float, *, ticks: int = 6) -> Axis:
    """Return a logarithmic axis of seconds, with about ``ticks`` ticks at times with short labels."""
    values = [value for value in _SHORT_TIMES if low_s <= value <= high_s]
    values = values[:: -(-len(values) // ticks) or 1]
    return Axis(low_s, high_s, tuple((value, duration(value)) for value in values), is_log=True)


def _mantissas(at_least: float) -> Iterable[float]:
    power = math.floor(math.log10(at_least))
    return (mantissa * 10.0**exponent for exponent in (power, power + 1) for mantissa in (1, 2, 5))


def number(value: float, width: float) -> str:
    """Return a label with the digits needed for ticks ``width`` apart: ``0.25``, ``1,500``, ``20k``."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scale = 1e3 if suffix == "k" else size
            digits = max(0, -math.floor(math.log10(width / scale) + 1e-9))
            return f"{value / scale:.{min(digits, 6)}f}{suffix}"
    digits = max(0, -math.floor(math.log10(width) + 1e-9))
    return f"{value:,.{digits}f}" if digits <= 6 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return a readable time in at most two units: ``2.5 ms``, ``12.3 s``, ``4 min 10 s``, ``3 d 4 h``."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    for (big, big_s), (small, small_s) in itertools.pairwise(_UNITS):
        parts = round(seconds / small_s)
        if seconds >= big_s or parts * small_s >= big_s:
            whole, rest = divmod(parts, round(big_s / small_s))
            return f"{whole} {big} {rest} {small}" if rest else f"{whole} {big}"
    return f"{seconds:.3g} s"


@dataclass(frozen=True)
class Bucket:
    """Neighbouring points of a series: the range of x, and extremes and mean of the finite values."""

    first: float
    last: float
    low: float
    mean: float
    high: float

    @property
    def middle(self) -> float:
        """The x position at which the bucket is drawn."""
        return (self.first + self.last) / 2


def downsample(xs: Sequence[float], ys: Sequence[float], *, buckets: int) -> list[Bucket]:
    """Reduce a series, ordered by ``xs``, to at most ``buckets`` buckets; one per point if they suffice.

    Extremes are kept, so that no spike is lost. Non-finite values are omitted.
    """
    if len(xs) <= buckets:
        return [Bucket(x, x, y, y, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    start, width = xs[0], (xs[-1] - xs[0]) / buckets or 1.0
    groups: dict[int, list[float]] = {}
    for x, y in zip(xs, ys, strict=True):
        if not math.isfinite(y):
            continue
        bucket = min(int((x - start) / width), buckets - 1)
        group = groups.get(bucket)
        if group is None:
            groups[bucket] = [x, x, y, y, y, 1]
            continue
        group[1] = x
        if y < group[2]:
            group[2] = y
        elif y > group[4]:
            group[4] = y
        group[3] += y
        group[5] += 1
    return [
        Bucket(first, last, low, total / count, high)
        for first, last, low, total, high, count in groups.values()
    ]


def line_path(points: Iterable[tuple[float, float]]) -> str:
    """Return the ``d`` of an SVG path through points of the unit square, y upward, scaled to 1000 x 1000."""
    return "M" + "L".join(f"{1000 * x:.1f} {1000 * (1 - y):.1f}" for x, y in points)


def band_path(points: Sequence[tuple[float, float, float]]) -> str:
    """Return the ``d`` of the area between two lines, from points of (x, low, high)."""
    upper = [(x, high) for x, _, high in points]
    return line_path([*upper, *((x, low) for x, low, _ in reversed(points))]) + "Z"


def dots_path(points: Iterable[tuple[float, float]]) -> str:
    """Return the ``d`` of dots: strokes of zero length with caps that are round in a stretched plot."""
    return "".join(f"M{1000 * x:.1f} {1000 * (1 - y):.1f}h0" for x, y in points)
