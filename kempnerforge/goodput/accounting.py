"""Where the time of a run went, from its history. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kempnerforge.goodput.history import AttemptHistory
from kempnerforge.goodput.interval import daly, rate_bounds, young

INTERRUPTIONS = ("fault", "lost")


def account(history: Sequence[AttemptHistory], *, now: float, running: bool) -> dict[str, Any]:
    """Seconds by part; they sum to ``wall_s``. ``rest`` is what no part of an attempt was measured to take.

    Steps count as lost when a later attempt began below them. ``running``: the last attempt is alive.
    """
    begun = [one for one in history if one.start is not None]
    names = ("effective", "lost", "data", "eval", "checkpoint", "setup", "rest", "idle")
    parts = dict.fromkeys(names, 0.0)
    if not begun:
        return {"wall_s": 0.0, "parts_s": parts, "ettr": 0.0, "lost_steps": 0, "attempts": []}
    rows: list[dict[str, Any]] = []
    before = 0.0
    for place, one in enumerate(begun):
        assert one.start is not None
        started = one.start["process_started"]
        ended = max(one.last_seen, now if running and one.is_last else 0.0)
        if before:
            parts["idle"] += max(0.0, started - before)
        began = [later.began_at for later in begun[place + 1 :] if later.began_at is not None]
        row = _attempt(one, kept_to=min(began, default=None), started=started, ended=ended)
        for name, seconds in row["parts_s"].items():
            parts[name] += seconds
        rows.append(row)
        before = ended
    first = begun[0].start
    assert first is not None
    wall_s = before - first["process_started"]
    return {
        "wall_s": wall_s,
        "parts_s": parts,
        "ettr": parts["effective"] / wall_s if wall_s else 0.0,
        "lost_steps": sum(row["lost_steps"] for row in rows),
        "attempts": rows,
    }


def _attempt(one: AttemptHistory, *, kept_to: int | None, started: float, ended: float) -> dict[str, Any]:
    """One attempt; steps above ``kept_to`` were done again."""
    marks = [
        event
        for event in (*one.progress, one.end)
        if event and event.get("spent_s") and event["step"] is not None
    ]
    spent = marks[-1]["spent_s"] if marks else {}
    parts: dict[str, float] = {name: spent.get(name, 0.0) for name in ("data", "eval")}
    inside = sum(event["blocking_s"] for event in one.commits)
    parts["checkpoint"] = inside
    # To the event itself: what comes after it is the loop.
    parts["setup"] = (one.resume["time"] if one.resume else ended) - started
    step_s, began, last = spent.get("step", 0.0), one.began_at or 0, one.last_step
    kept = last if kept_to is None else min(max(kept_to, began), last)
    lost_s = step_s - _step_s_at(kept, began, marks)
    parts["lost"], parts["effective"] = lost_s, step_s - lost_s
    parts["rest"] = ended - started - sum(parts.values())
    return {
        "attempt": one.number,
        "kind": one.kind,
        "reason": one.reason,
        "began_at": one.began_at,
        "last_step": last,
        "lost_steps": last - kept,
        "started": started,
        "wall_s": ended - started,
        "parts_s": parts,
    }


def _step_s_at(step: int, began: int, marks: Sequence[dict[str, Any]]) -> float:
    """Seconds spent in steps up to ``step``, between two summaries in proportion."""
    low_step, low_s = began, 0.0
    for mark in marks:
        high_step, high_s = mark["step"], mark["spent_s"].get("step", 0.0)
        if high_step >= step:
            width = high_step - low_step
            return high_s if width <= 0 else low_s + (high_s - low_s) * (step - low_step) / width
        low_step, low_s = high_step, high_s
    return low_s


def saving(history: Sequence[AttemptHistory], *, wall_s: float) -> dict[str, Any]:
    """Checkpoint timings, the failure rate with its 95% interval, and the intervals that follow from them.

    A failure is an attempt that ended in a fault of its own or was lost; a stop that was
    agreed on loses nothing.
    """
    commits = [event for one in history for event in one.commits]
    failures = sum(one.kind in INTERRUPTIONS and not one.is_last for one in history)
    low, high = rate_bounds(failures)
    mtti_s = wall_s / failures if failures else None
    timings = {
        name: {f"p{percent}": _quantile([event[name] for event in commits], percent) for percent in (50, 99)}
        for name in ("blocking_s", "write_s", "commit_s", "total_s")
    }
    stall_s = _quantile([event["blocking_s"] for event in commits], 50)
    known = bool(mtti_s and stall_s)
    return {
        "commits": len(commits),
        "timings": timings,
        "failures": failures,
        "mtti_s": mtti_s,
        "mtti_95_s": [wall_s / high, wall_s / low if low else None],
        "young_s": young(stall_s, mtti_s) if known and mtti_s and stall_s else None,
        "daly_s": daly(stall_s, mtti_s) if known and mtti_s and stall_s else None,
    }


def _quantile(values: list[float], percent: int) -> float | None:
    """Nearest rank; None without values."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else None
