"""The timeline of the report page: the phases, commits and end of each attempt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from kempnerforge.cli.formatting import count
from kempnerforge.cli.report_text import attempt_words, clipped, reason_of
from kempnerforge.goodput.plot import duration, time_axis
from kempnerforge.goodput.timeline_segments import KINDS, Segment, find_segments, rasterize

MAX_LINES = 40
"""More attempts than this are drawn on one line."""
CELLS = 600
COMMIT_CELLS = 250
"""Commits in the same one of this many cells share a mark, which names their number."""
NAMES = {
    "idle": "idle between attempts",
    "setup": "setup",
    "load": "loading a checkpoint",
    "training": "training",
    "lost": "lost: repeated or rolled back",
}
CSS = {"training": "effective"}
"""Kind -> its CSS class, where the names differ."""
SIGNS = {"finished": "✓", "running": "▶", "stopped": "■", "deadline": "■"}
"""Kind of end -> its sign. All other kinds are failures."""
FAILED = "✕"


class Commit(NamedTuple):
    """A commit recorded in the ledger."""

    attempt: int
    time: float
    step: int


def timeline_figure(
    attempts: Sequence[Mapping[str, Any]], commits: Sequence[Commit], *, wall_s: float
) -> str:
    """Return the timeline. ``attempts`` and ``wall_s`` are results of ``account``."""
    head = '<figure id="timeline" class="card"><figcaption><h2>Timeline</h2>'
    if not attempts or wall_s <= 0:
        return f'{head}<p class="words">No attempt has recorded enough events yet.</p></figcaption></figure>'
    segments = find_segments(attempts)
    shown = [kind for kind in KINDS if any(segment.kind == kind for segment in segments)]
    keys = [f'<li><i class="key c-{CSS.get(kind, kind)}"></i>{NAMES[kind]}</li>' for kind in shown]
    if commits:
        keys.append('<li><i class="key commit"></i>commit</li>')
    axis = time_axis(wall_s)
    step = axis.ticks[1][0] / wall_s if len(axis.ticks) > 1 else 1.0
    lines, note = _lines, ""
    if len(attempts) > MAX_LINES:
        lines, note = _one_line, " All are drawn on one line, which shows the longest phase in each cell."
    ticks = "".join(
        f'<span class="xtick" style="left:{100 * axis.place(value):.2f}%">{label}</span>'
        for value, label in axis.ticks
    )
    words = (
        f"{count(len(attempts), 'attempt')} in {duration(wall_s)}, {count(len(commits), 'commit')}, "
        f"{count(sum(attempt['lost_steps'] for attempt in attempts), 'lost step')}. "
        f"How they ended: {_ends(attempts)}.{note}"
    )
    return (
        f'{head}<p class="words">{escape(words)}</p></figcaption><ul class="legend">{"".join(keys)}</ul>'
        f'<ol class="lines" style="--tick:{100 * step:.4f}%">{lines(attempts, segments, commits, wall_s)}'
        f'<li class="axis" aria-hidden="true"><span class="who"></span><div class="track">{ticks}</div>'
        '<span class="end"></span></li></ol>'
        '<p class="unit below">time since the start of the first attempt</p></figure>'
    )


def _ends(attempts: Sequence[Mapping[str, Any]]) -> str:
    kinds = [attempt["kind"] for attempt in attempts]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def _lines(
    attempts: Sequence[Mapping[str, Any]],
    segments: Sequence[Segment],
    commits: Sequence[Commit],
    wall_s: float,
) -> str:
    return "".join(
        _line(
            str(attempt["attempt"]),
            [_bar(segment, wall_s) for segment in segments if segment.attempt == attempt["attempt"]],
            [commit for commit in commits if commit.attempt == attempt["attempt"]],
            origin=attempts[0]["started"],
            wall_s=wall_s,
            label=f"{attempt_words(attempt)}; {attempt['kind']}: {clipped(reason_of(attempt))}",
            end=end_sign(attempt["kind"]),
            attempts=1,
        )
        for attempt in attempts
    )


def _one_line(
    attempts: Sequence[Mapping[str, Any]],
    segments: Sequence[Segment],
    commits: Sequence[Commit],
    wall_s: float,
) -> str:
    bars = [
        f'<i class="bar c-{CSS.get(kind, kind)}" style="left:{100 * first / CELLS:.2f}%;'
        f'width:{100 * (last - first) / CELLS:.2f}%" title="{NAMES[kind]}"></i>'
        for first, last, kind in rasterize(segments, wall_s=wall_s, columns=CELLS)
    ]
    origin = attempts[0]["started"]
    return _line(
        "all",
        bars,
        commits,
        origin=origin,
        wall_s=wall_s,
        label=f"{len(attempts)} attempts on one line",
        end="",
        attempts=len(attempts),
    )


def _line(
    who: str,
    bars: Sequence[str],
    commits: Sequence[Commit],
    *,
    origin: float,
    wall_s: float,
    label: str,
    end: str,
    attempts: int,
) -> str:
    marks = _commit_marks(commits, origin=origin, wall_s=wall_s)
    return (
        f'<li data-attempts="{attempts}"><span class="who">{who}</span><div class="track" role="img" '
        f'aria-label="{escape(label)}">{"".join(bars)}{marks}</div><span class="end">{end}</span></li>'
    )


def _bar(segment: Segment, wall_s: float) -> str:
    took_s = segment.ended - segment.began
    style = f"left:{100 * segment.began / wall_s:.3f}%;width:{100 * took_s / wall_s:.3f}%"
    title = f"{NAMES[segment.kind]}: {duration(took_s)}, starting at {duration(segment.began)}"
    return f'<i class="bar c-{CSS.get(segment.kind, segment.kind)}" style="{style}" title="{title}"></i>'


def _commit_marks(commits: Sequence[Commit], *, origin: float, wall_s: float) -> str:
    groups: dict[int, list[Commit]] = {}
    for commit in commits:
        groups.setdefault(int(COMMIT_CELLS * _since(origin, commit, wall_s) / wall_s), []).append(commit)
    marks = []
    for group in groups.values():
        at = _since(origin, group[0], wall_s)
        steps = sorted(commit.step for commit in group)
        what = (
            f"step {steps[0]:,}" if len(group) == 1 else f"{len(group)} steps, {steps[0]:,} to {steps[-1]:,}"
        )
        marks.append(
            f'<i class="commit" data-commits="{len(group)}" style="left:{100 * at / wall_s:.3f}%" '
            f'title="{what} committed at {duration(at)}"></i>'
        )
    return "".join(marks)


def _since(origin: float, commit: Commit, wall_s: float) -> float:
    """Return seconds since ``origin``, limited to the duration of the run in case clocks disagree."""
    return min(max(0.0, commit.time - origin), wall_s)


def end_sign(kind: str) -> str:
    """Return the kind of an end with a sign that is readable without colour."""
    sign = SIGNS.get(kind, FAILED)
    css = "failed" if sign == FAILED else "finished" if kind == "finished" else "other"
    return f'<b class="sign {css}" aria-hidden="true">{sign}</b> {escape(kind)}'
