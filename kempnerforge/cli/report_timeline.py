"""The timeline of the report's page: what each attempt did when, its commits, how it ended. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from kempnerforge.cli.formatting import count
from kempnerforge.cli.report_text import attempt_words, clipped
from kempnerforge.goodput.plot import duration, time_axis
from kempnerforge.goodput.timeline_segments import KINDS, Segment, rasterize, stretches

MAX_LINES = 40
"""With more attempts than that, all of them are drawn on one line."""
CELLS = 600
COMMIT_CELLS = 250
"""Commits nearer than that share a mark, which says how many they are."""
NAMES = {
    "idle": "idle between attempts",
    "setup": "set-up",
    "load": "load",
    "training": "training",
    "lost": "lost: done again, or rolled back",
}
CSS = {"training": "effective"}
"""Kinds that are drawn as a part of another name."""
SIGNS = {"finished": "✓", "running": "▶", "stopped": "■", "deadline": "■"}
"""Of kinds of end; any other is a failure."""
FAILED = "✕"


class Commit(NamedTuple):
    """A commit, as the ledger has it."""

    attempt: int
    time: float
    step: int


def timeline_figure(
    attempts: Sequence[Mapping[str, Any]], commits: Sequence[Commit], *, wall_s: float
) -> str:
    """The timeline; ``attempts`` and ``wall_s`` as ``account`` gives them."""
    head = '<figure id="timeline" class="card"><figcaption><h2>Timeline</h2>'
    if not attempts or wall_s <= 0:
        return f'{head}<p class="words">No attempt has come far enough to be drawn.</p></figcaption></figure>'
    found = stretches(attempts)
    shown = [kind for kind in KINDS if any(one.kind == kind for one in found)]
    keys = [f'<li><i class="key c-{CSS.get(kind, kind)}"></i>{NAMES[kind]}</li>' for kind in shown]
    if commits:
        keys.append('<li><i class="key commit"></i>commit</li>')
    axis = time_axis(wall_s)
    step = axis.ticks[1][0] / wall_s if len(axis.ticks) > 1 else 1.0
    lines, note = _lines, ""
    if len(attempts) > MAX_LINES:
        lines, note = _one_line, " All are on one line: each place of it shows what fills most of it."
    ticks = "".join(
        f'<span class="xtick" style="left:{100 * axis.place(value):.2f}%">{label}</span>'
        for value, label in axis.ticks
    )
    words = (
        f"{count(len(attempts), 'attempt')} in {duration(wall_s)}, {count(len(commits), 'commit')}, "
        f"{count(sum(one['lost_steps'] for one in attempts), 'lost step')}. "
        f"How they ended: {_ends(attempts)}.{note}"
    )
    return (
        f'{head}<p class="words">{escape(words)}</p></figcaption><ul class="legend">{"".join(keys)}</ul>'
        f'<ol class="lines" style="--tick:{100 * step:.4f}%">{lines(attempts, found, commits, wall_s)}'
        f'<li class="axis" aria-hidden="true"><span class="who"></span><div class="track">{ticks}</div>'
        '<span class="end"></span></li></ol>'
        '<p class="unit below">time since the first attempt began</p></figure>'
    )


def _ends(attempts: Sequence[Mapping[str, Any]]) -> str:
    kinds = [one["kind"] for one in attempts]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def _lines(
    attempts: Sequence[Mapping[str, Any]], found: Sequence[Segment], commits: Sequence[Commit], wall_s: float
) -> str:
    return "".join(
        _line(
            str(one["attempt"]),
            [_bar(each, wall_s) for each in found if each.attempt == one["attempt"]],
            [commit for commit in commits if commit.attempt == one["attempt"]],
            origin=attempts[0]["started"],
            wall_s=wall_s,
            told=f"{attempt_words(one)}; {one['kind']}: {clipped(one['reason'])}",
            end=end_sign(one["kind"]),
            attempts=1,
        )
        for one in attempts
    )


def _one_line(
    attempts: Sequence[Mapping[str, Any]], found: Sequence[Segment], commits: Sequence[Commit], wall_s: float
) -> str:
    bars = [
        f'<i class="bar c-{CSS.get(kind, kind)}" style="left:{100 * first / CELLS:.2f}%;'
        f'width:{100 * (last - first) / CELLS:.2f}%" title="{NAMES[kind]}"></i>'
        for first, last, kind in rasterize(found, wall_s=wall_s, columns=CELLS)
    ]
    origin = attempts[0]["started"]
    return _line(
        "all",
        bars,
        commits,
        origin=origin,
        wall_s=wall_s,
        told=f"{len(attempts)} attempts on one line",
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
    told: str,
    end: str,
    attempts: int,
) -> str:
    marks = _commit_marks(commits, origin=origin, wall_s=wall_s)
    return (
        f'<li data-attempts="{attempts}"><span class="who">{who}</span><div class="track" role="img" '
        f'aria-label="{escape(told)}">{"".join(bars)}{marks}</div><span class="end">{end}</span></li>'
    )


def _bar(one: Segment, wall_s: float) -> str:
    took_s = one.ended - one.began
    place = f"left:{100 * one.began / wall_s:.3f}%;width:{100 * took_s / wall_s:.3f}%"
    title = f"{NAMES[one.kind]}: {duration(took_s)}, from {duration(one.began)} on"
    return f'<i class="bar c-{CSS.get(one.kind, one.kind)}" style="{place}" title="{title}"></i>'


def _commit_marks(commits: Sequence[Commit], *, origin: float, wall_s: float) -> str:
    groups: dict[int, list[Commit]] = {}
    for one in commits:
        groups.setdefault(int(COMMIT_CELLS * _since(origin, one, wall_s) / wall_s), []).append(one)
    marks = []
    for group in groups.values():
        at = _since(origin, group[0], wall_s)
        steps = sorted(one.step for one in group)
        what = (
            f"step {steps[0]:,}" if len(group) == 1 else f"{len(group)} steps, {steps[0]:,} to {steps[-1]:,}"
        )
        marks.append(
            f'<i class="commit" data-commits="{len(group)}" style="left:{100 * at / wall_s:.3f}%" '
            f'title="{what} committed at {duration(at)}"></i>'
        )
    return "".join(marks)


def _since(origin: float, commit: Commit, wall_s: float) -> float:
    """Seconds; within the run, whatever a clock says."""
    return min(max(0.0, commit.time - origin), wall_s)


def end_sign(kind: str) -> str:
    """The kind of an end, with a sign that does not rest on colour."""
    sign = SIGNS.get(kind, FAILED)
    css = "failed" if sign == FAILED else "finished" if kind == "finished" else "other"
    return f'<b class="sign {css}" aria-hidden="true">{sign}</b> {escape(kind)}'
