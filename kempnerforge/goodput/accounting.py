"""Compute how the time of a run was spent, from the history of its attempts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kempnerforge.goodput.history import AttemptHistory
from kempnerforge.goodput.interval import daly, expected_overhead, rate_bounds, young

INTERRUPTIONS = ("fault", "lost")
_CLOCK_TOLERANCE_S = 1.0
"""Clock differences between hosts up to this are not reported."""
PARTS = ("effective", "lost", "data", "eval", "checkpoint", "setup", "load", "rest", "idle")


def account(history: Sequence[AttemptHistory], *, now: float, running: bool) -> dict[str, Any]:
    """Return the seconds of each part of the run's time, which sum to ``wall_s``.

    - The part ``rest`` is the time of the attempts that was not measured.
    - ``setup_parts_s`` sum to the part ``setup``.
    - Steps are lost if a later attempt started below them.
    - ``running`` says that the last attempt is still running.
    - Refused starts are counted in ``refused_starts`` only.
    - Time after a run had finished is excluded from ``wall_s``, but included in ``span_s``, the
      time from the first start to the last event.
    - If attempts overlap, or a clock was set back, each second is counted once, for the earlier
      attempt, and ``clocks_disagree`` is true.
    """
    begun = [attempt for attempt in history if attempt.start is not None and not _is_refused(attempt)]
    parts = dict.fromkeys(PARTS, 0.0)
    setup: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    disagree, before = False, None
    for index, attempt in enumerate(begun):
        assert attempt.start is not None
        recorded_start = attempt.start["process_started"]
        last_seen = max(attempt.last_seen, now if running and attempt.is_last else 0.0)
        started = recorded_start if before is None else max(recorded_start, before)
        ended = max(last_seen, started)
        disagree |= recorded_start < started - _CLOCK_TOLERANCE_S
        disagree |= last_seen < recorded_start - _CLOCK_TOLERANCE_S
        if before is not None and begun[index - 1].kind != "finished":
            parts["idle"] += started - before
        began = [later.began_at for later in begun[index + 1 :] if later.began_at is not None]
        row = _attempt(attempt, kept_to=min(began, default=None), started=started, ended=ended)
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
        "refused_starts": sum(attempt.start is not None and _is_refused(attempt) for attempt in history),
        "clocks_disagree": disagree,
        "attempts": rows,
    }


def _is_refused(attempt: AttemptHistory) -> bool:
    """Return whether a start was refused before it loaded anything: by its config or the crash-loop guard."""
    return attempt.kind in ("config", "blocked") and attempt.resume is None


def _attempt(attempt: AttemptHistory, *, kept_to: int | None, started: float, ended: float) -> dict[str, Any]:
    """Return the row of an attempt. Steps above ``kept_to`` were repeated."""
    marks = [
        event
        for event in (*attempt.progress, attempt.end)
        if event and event.get("spent_s") and event["step"] is not None
    ]
    spent = marks[-1]["spent_s"] if marks else {}
    parts: dict[str, float] = {name: spent.get(name, 0.0) for name in ("data", "eval")}
    parts["checkpoint"] = sum(event["blocking_s"] for event in attempt.commits)
    setup = {name: max(0.0, each_s) for name, each_s in _setup(attempt, started=started, ended=ended).items()}
    parts["load"] = attempt.resume.get("load_s", 0.0) if attempt.resume else 0.0
    parts["setup"] = sum(setup.values())
    step_s, began = spent.get("step", 0.0), attempt.began_at or 0
    last = attempt.last_step if attempt.resume is not None else 0
    kept = last if kept_to is None else min(max(kept_to, began), last)
    lost_s = min(max(0.0, step_s - _step_s_at(kept, began, marks)), step_s)
    parts["lost"], parts["effective"] = lost_s, step_s - lost_s
    wall_s = ended - started
    parts = _within(wall_s, parts)
    whole_s = sum(setup.values())
    setup = {name: each_s * parts["setup"] / whole_s for name, each_s in setup.items()} if whole_s else setup
    parts["rest"] = max(0.0, wall_s - sum(parts.values()))

    def clamped(moment: float) -> float:
        return min(max(moment, started), ended)

    return {
        "attempt": attempt.number,
        "kind": attempt.kind,
        "reason": attempt.reason,
        "began_at": attempt.began_at,
        "last_step": last,
        "lost_steps": last - kept,
        "started": started,
        "resumed": clamped(attempt.resume["time"]) if attempt.resume else None,
        "lost_from": clamped(_time_at(kept, attempt)) if last > kept else None,
        "wall_s": wall_s,
        "parts_s": parts,
        "setup_parts_s": setup,
    }


def _within(wall_s: float, parts: dict[str, float]) -> dict[str, float]:
    """Reduce ``parts`` until their sum is at most ``wall_s``.

    The sum is larger if a clock was set back, or if part of the time is counted for an earlier
    attempt.
    """
    reduced = {name: max(0.0, seconds) for name, seconds in parts.items()}
    excess_s = sum(reduced.values()) - wall_s
    for name in PARTS:
        if excess_s > 0 and name in reduced:
            cut_s = min(reduced[name], excess_s)
            reduced[name] -= cut_s
            excess_s -= cut_s
    return reduced


def _setup(attempt: AttemptHistory, *, started: float, ended: float) -> dict[str, float]:
    """Return the seconds of each phase of the setup without the load; ``unfinished`` if it did not end."""
    if attempt.resume is None:
        return {"unfinished": ended - started}
    measured = attempt.resume.get("setup_s", {})
    phases = {name: seconds for name, seconds in measured.items() if name != "resume"}
    # The setup ends at the time of the event, when the loop begins.
    took_s = attempt.resume["time"] - started - attempt.resume.get("load_s", 0.0)
    return {**phases, "resume": took_s - sum(phases.values())}


def _time_at(step: int, attempt: AttemptHistory) -> float:
    """Return when an attempt completed ``step``, interpolated between two events."""
    assert attempt.resume is not None
    low_step, low = attempt.resume["step"], attempt.resume["time"]
    for event in (*attempt.progress, attempt.end):
        if step <= low_step or event is None or event["step"] is None:
            break
        if event["step"] >= step:
            return low + (event["time"] - low) * (step - low_step) / (event["step"] - low_step)
        low_step, low = event["step"], event["time"]
    return low


def _step_s_at(step: int, began: int, marks: Sequence[dict[str, Any]]) -> float:
    """Return seconds spent in steps up to ``step``, interpolated between two summaries."""
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
    """Return checkpoint timings, the failure rate with its 95% bounds, and the resulting best intervals.

    Failures and training time are those of ``interruptions``, which interval = "auto" uses too.
    ``wall_s`` is the time of all attempts, from which the saving of another interval is computed.
    """
    commits = [event for attempt in history for event in attempt.commits]
    failures, trained_s = _failures_so_far(history, rollbacks)
    low, high = rate_bounds(failures)
    mtti_s = trained_s / failures if failures else None
    timings = {
        name: {f"p{percent}": _quantile([event[name] for event in commits], percent) for percent in (50, 99)}
        for name in ("blocking_s", "write_s", "commit_s", "total_s")
    }
    # The overhead is missing in older ledgers, and for saves before a baseline of step times
    # exists.
    overheads = [max(event.get("tax_s") or 0.0, event["blocking_s"]) for event in commits]
    stall_s, lag_s = _quantile(overheads, 50), timings["total_s"]["p50"]
    interval_s = _quantile([gap for attempt in history for gap in _gaps(attempt)], 50)
    result: dict[str, Any] = {
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
        return result
    best_s = daly(stall_s, mtti_s)
    result |= {"young_s": young(stall_s, mtti_s), "daly_s": best_s}
    if interval_s and lag_s is not None:
        costs = {"stall_s": stall_s, "mtti_s": mtti_s, "lag_s": lag_s, "restart_s": _restart_s(history)}
        result["expected"] = _expected(interval_s, best_s, wall_s=wall_s, costs=costs)
    return result


def _expected(interval_s: float, daly_s: float, *, wall_s: float, costs: dict[str, float]) -> dict[str, Any]:
    """Return the expected overhead of saving at the measured interval and at Daly's.

    A save starts only after the previous one is committed, so the interval cannot be shorter than
    the lag.
    """
    best_s = max(daly_s, costs["lag_s"])
    measured, best = (expected_overhead(seconds, **costs) for seconds in (interval_s, best_s))
    return {
        **costs,
        "best_interval_s": best_s,
        "overhead": measured,
        "best_overhead": best,
        "saved_s": (measured - best) * wall_s,
    }


def _gaps(attempt: AttemptHistory) -> list[float]:
    """Return seconds from the start of training, after a resume or a stall, to the start of the next save."""
    gaps: list[float] = []
    training_from = attempt.resume["time"] if attempt.resume else None
    for event in attempt.commits:
        began = event["time"] - event["total_s"]
        if training_from is not None:
            gaps.append(max(0.0, began - training_from))
        training_from = began + event["blocking_s"]
    return gaps


def _restart_s(history: Sequence[AttemptHistory]) -> float:
    """Return mean seconds from the start of the process to the first step, over attempts after the first."""
    took_s = [
        attempt.resume["time"] - attempt.start["process_started"]
        for attempt in history[1:]
        if attempt.start is not None and attempt.resume is not None
    ]
    return sum(took_s) / len(took_s) if took_s else 0.0


def interruptions(
    history: Sequence[AttemptHistory], *, resumed_at: int, rollbacks: Sequence[int] = ()
) -> tuple[int, float]:
    """Return failures during training and seconds of training, over all attempts but the running one.

    An attempt that ended in a fault or was lost is a failure. An attempt that was stopped and lost
    steps is a failure too, because it had no time to save. It is not if a rollback (an attempt
    number in ``rollbacks``) discarded these steps. An attempt that did not reach training is not
    counted, because a save could not have helped it. ``resumed_at`` is the step from which the
    running attempt resumed.
    """
    trained = [attempt for attempt in history if attempt.resume is not None and not attempt.is_last]
    failures, seconds = 0, 0.0
    for index, attempt in enumerate(trained):
        assert attempt.resume is not None
        seconds += max(0.0, attempt.last_seen - attempt.resume["time"])
        later = trained[index + 1] if index + 1 < len(trained) else history[-1]
        next_began = resumed_at if later.is_last else later.began_at or 0
        rolled_back = any(attempt.number < number <= later.number for number in rollbacks)
        cut_short = (
            attempt.kind in ("stopped", "deadline") and next_began < attempt.last_step and not rolled_back
        )
        failures += attempt.kind in INTERRUPTIONS or cut_short
    return failures, seconds


def _failures_so_far(history: Sequence[AttemptHistory], rollbacks: Sequence[int]) -> tuple[int, float]:
    """Return ``interruptions`` including the training time of the last attempt."""
    if not history:
        return 0, 0.0
    last = history[-1]
    resumed = [attempt for attempt in history if attempt.resume is not None]
    done = max((attempt.last_step for attempt in resumed[-1:]), default=0)
    failures, seconds = interruptions(
        history, resumed_at=done if last.began_at is None else last.began_at, rollbacks=rollbacks
    )
    if last.resume is not None:
        seconds += max(0.0, last.last_seen - last.resume["time"])
    return failures, seconds


def _quantile(values: list[float], percent: int) -> float | None:
    """Return a nearest-rank percentile; None without values."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else None
