"""Where the time of a run went, from its history. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kempnerforge.goodput.history import AttemptHistory
from kempnerforge.goodput.interval import daly, expected_overhead, rate_bounds, young

INTERRUPTIONS = ("fault", "lost")
_CLOCK_TOLERANCE_S = 1.0
"""By so much the clocks of two hosts may differ unsaid."""
PARTS = ("effective", "lost", "data", "eval", "checkpoint", "setup", "load", "rest", "idle")


def account(history: Sequence[AttemptHistory], *, now: float, running: bool) -> dict[str, Any]:
    """Seconds by part; they sum to ``wall_s``. ``rest`` is what no part of an attempt was measured to take.

    ``setup_parts_s`` sum to the part ``setup``. Steps count as lost when a later attempt began below them.
    ``running``: the last attempt is alive. Starts that were refused are counted in ``refused_starts`` alone,
    and the time after a run had finished is left out. Where attempts overlap, or a clock went back, each
    second counts once, for the earlier attempt, and ``clocks_disagree`` is true. ``span_s``: from the first
    start to the last sign of life, with what is left out.
    """
    begun = [one for one in history if one.start is not None and not _is_refused(one)]
    parts = dict.fromkeys(PARTS, 0.0)
    setup: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    disagree, before = False, None
    for place, one in enumerate(begun):
        assert one.start is not None
        told = one.start["process_started"]
        last_seen = max(one.last_seen, now if running and one.is_last else 0.0)
        started = told if before is None else max(told, before)
        ended = max(last_seen, started)
        disagree |= told < started - _CLOCK_TOLERANCE_S or last_seen < told - _CLOCK_TOLERANCE_S
        if before is not None and begun[place - 1].kind != "finished":
            parts["idle"] += started - before
        began = [later.began_at for later in begun[place + 1 :] if later.began_at is not None]
        row = _attempt(one, kept_to=min(began, default=None), started=started, ended=ended)
        for name, seconds in row["parts_s"].items():
            parts[name] += seconds
        for name, seconds in row["setup_parts_s"].items():
            setup[name] = setup.get(name, 0.0) + seconds
        rows.append(row)
        before = ended
    wall_s = sum(parts.values())
    return {
        "wall_s": wall_s,
        "span_s": before - rows[0]["started"] if before is not None else 0.0,
        "parts_s": parts,
        "setup_parts_s": setup,
        "ettr": parts["effective"] / wall_s if wall_s else 0.0,
        "lost_steps": sum(row["lost_steps"] for row in rows),
        "refused_starts": sum(one.start is not None and _is_refused(one) for one in history),
        "clocks_disagree": disagree,
        "attempts": rows,
    }


def _is_refused(one: AttemptHistory) -> bool:
    """Whether a start was turned down before it loaded anything: by its config, or as one fault too many."""
    return one.kind in ("config", "blocked") and one.resume is None


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
    setup = {name: max(0.0, each_s) for name, each_s in _setup(one, started=started, ended=ended).items()}
    parts["load"] = one.resume.get("load_s", 0.0) if one.resume else 0.0
    parts["setup"] = sum(setup.values())
    step_s, began = spent.get("step", 0.0), one.began_at or 0
    last = one.last_step if one.resume is not None else 0
    kept = last if kept_to is None else min(max(kept_to, began), last)
    lost_s = min(max(0.0, step_s - _step_s_at(kept, began, marks)), step_s)
    parts["lost"], parts["effective"] = lost_s, step_s - lost_s
    wall_s = ended - started
    parts = _within(wall_s, parts)
    whole_s = sum(setup.values())
    setup = {name: each_s * parts["setup"] / whole_s for name, each_s in setup.items()} if whole_s else setup
    parts["rest"] = max(0.0, wall_s - sum(parts.values()))

    def inside_of_it(moment: float) -> float:
        return min(max(moment, started), ended)

    return {
        "attempt": one.number,
        "kind": one.kind,
        "reason": one.reason,
        "began_at": one.began_at,
        "last_step": last,
        "lost_steps": last - kept,
        "started": started,
        "resumed": inside_of_it(one.resume["time"]) if one.resume else None,
        "lost_from": inside_of_it(_time_at(kept, one)) if last > kept else None,
        "wall_s": wall_s,
        "parts_s": parts,
        "setup_parts_s": setup,
    }


def _within(wall_s: float, parts: dict[str, float]) -> dict[str, float]:
    """``parts`` cut to ``wall_s`` in all: a clock went back, or an earlier attempt has some of that time."""
    found = {name: max(0.0, seconds) for name, seconds in parts.items()}
    excess_s = sum(found.values()) - wall_s
    for name in PARTS:
        if excess_s > 0 and name in found:
            cut_s = min(found[name], excess_s)
            found[name] -= cut_s
            excess_s -= cut_s
    return found


def _setup(one: AttemptHistory, *, started: float, ended: float) -> dict[str, float]:
    """Seconds of the set-up without the load, by part; ``unfinished`` where it did not come to an end."""
    if one.resume is None:
        return {"unfinished": ended - started}
    laps = one.resume.get("setup_s", {})
    found = {name: seconds for name, seconds in laps.items() if name != "resume"}
    # To the event itself, on the clock of the events: what comes after it is the loop.
    took_s = one.resume["time"] - started - one.resume.get("load_s", 0.0)
    return {**found, "resume": took_s - sum(found.values())}


def _time_at(step: int, one: AttemptHistory) -> float:
    """When an attempt that began had done ``step``, between two events in proportion."""
    assert one.resume is not None
    low_step, low = one.resume["step"], one.resume["time"]
    for event in (*one.progress, one.end):
        if step <= low_step or event is None or event["step"] is None:
            break
        if event["step"] >= step:
            return low + (event["time"] - low) * (step - low_step) / (event["step"] - low_step)
        low_step, low = event["step"], event["time"]
    return low


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


def saving(
    history: Sequence[AttemptHistory], *, wall_s: float, rollbacks: Sequence[int] = ()
) -> dict[str, Any]:
    """Checkpoint timings, the failure rate with its 95% interval, and the intervals that follow from them.

    Failures, and the time in training that they came in, are those of ``interruptions``: what "auto" goes by.
    ``wall_s``: all time of the attempts, for what another interval would have saved.
    """
    commits = [event for one in history for event in one.commits]
    failures, trained_s = _failures_so_far(history, rollbacks)
    low, high = rate_bounds(failures)
    mtti_s = trained_s / failures if failures else None
    timings = {
        name: {f"p{percent}": _quantile([event[name] for event in commits], percent) for percent in (50, 99)}
        for name in ("blocking_s", "write_s", "commit_s", "total_s")
    }
    # An older ledger knows no tax, nor does a save before the first quiet steps.
    taxes = [max(event.get("tax_s") or 0.0, event["blocking_s"]) for event in commits]
    stall_s, lag_s = _quantile(taxes, 50), timings["total_s"]["p50"]
    interval_s = _quantile([gap for one in history for gap in _gaps(one)], 50)
    found: dict[str, Any] = {
        "commits": len(commits),
        "timings": timings,
        "failures": failures,
        "mtti_s": mtti_s,
        "mtti_95_s": [trained_s / high, trained_s / low if low else None],
        "interval_s": interval_s,
        "young_s": None,
        "daly_s": None,
        "expected": None,
    }
    if not mtti_s or not stall_s:
        return found
    best_s = daly(stall_s, mtti_s)
    found |= {"young_s": young(stall_s, mtti_s), "daly_s": best_s}
    if interval_s and lag_s is not None:
        known = {"stall_s": stall_s, "mtti_s": mtti_s, "lag_s": lag_s, "restart_s": _restart_s(history)}
        found["expected"] = _expected(interval_s, best_s, wall_s=wall_s, known=known)
    return found


def _expected(interval_s: float, daly_s: float, *, wall_s: float, known: dict[str, float]) -> dict[str, Any]:
    """What the model expects saving to cost, at the measured interval and at Daly's.

    No save begins before the one before it is committed: an interval below the lag cannot be had.
    """
    best_s = max(daly_s, known["lag_s"])
    measured, best = (expected_overhead(each_s, **known) for each_s in (interval_s, best_s))
    return {
        **known,
        "best_interval_s": best_s,
        "overhead": measured,
        "best_overhead": best,
        "saved_s": (measured - best) * wall_s,
    }


def _gaps(one: AttemptHistory) -> list[float]:
    """Seconds from where training goes on, after a resume or a stall, to the beginning of the next save."""
    gaps: list[float] = []
    goes_on = one.resume["time"] if one.resume else None
    for event in one.commits:
        began = event["time"] - event["total_s"]
        if goes_on is not None:
            gaps.append(max(0.0, began - goes_on))
        goes_on = began + event["blocking_s"]
    return gaps


def _restart_s(history: Sequence[AttemptHistory]) -> float:
    """Mean seconds from the start of a process to its first step, for attempts after the first."""
    took_s = [
        one.resume["time"] - one.start["process_started"]
        for one in history[1:]
        if one.start is not None and one.resume is not None
    ]
    return sum(took_s) / len(took_s) if took_s else 0.0


def interruptions(
    history: Sequence[AttemptHistory], *, resumed_at: int, rollbacks: Sequence[int] = ()
) -> tuple[int, float]:
    """Failures in training, and the seconds that were trained, of all attempts but the last, which runs.

    An attempt that ended in a fault or was lost is a failure; so is one that was stopped and lost steps (it
    had no time to save), unless a rollback, an attempt number in ``rollbacks``, took them. One that did not
    get as far as training counts for nothing: no saving would have helped it. ``resumed_at``: the step that
    the running attempt went on from.
    """
    trained = [one for one in history if one.resume is not None and not one.is_last]
    failures, seconds = 0, 0.0
    for place, one in enumerate(trained):
        assert one.resume is not None
        seconds += max(0.0, one.last_seen - one.resume["time"])
        later = trained[place + 1] if place + 1 < len(trained) else history[-1]
        next_began = resumed_at if later.is_last else later.began_at or 0
        rolled_back = any(one.number < number <= later.number for number in rollbacks)
        cut_short = one.kind in ("stopped", "deadline") and next_began < one.last_step and not rolled_back
        failures += one.kind in INTERRUPTIONS or cut_short
    return failures, seconds


def _failures_so_far(history: Sequence[AttemptHistory], rollbacks: Sequence[int]) -> tuple[int, float]:
    """``interruptions``, with what the last attempt has trained."""
    if not history:
        return 0, 0.0
    last = history[-1]
    resumed = [one for one in history if one.resume is not None]
    done = max((one.last_step for one in resumed[-1:]), default=0)
    failures, seconds = interruptions(
        history, resumed_at=done if last.began_at is None else last.began_at, rollbacks=rollbacks
    )
    if last.resume is not None:
        seconds += max(0.0, last.last_seen - last.resume["time"])
    return failures, seconds


def _quantile(values: list[float], percent: int) -> float | None:
    """Nearest rank; None without values."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else None
