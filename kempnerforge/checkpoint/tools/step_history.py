"""Explain what happened to a step of a run, from folders, receipts, ledger and config."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.run import lease
from kempnerforge.checkpoint.run.resume_report import read_receipts
from kempnerforge.goodput.event_log import Event, read_events
from kempnerforge.goodput.faults import read_faults
from kempnerforge.goodput.history import AttemptHistory, derive

if TYPE_CHECKING:  # the command line imports pydantic only where it reads a config
    from kempnerforge.config.schema import CheckpointConfig

STATES = (
    *("set aside", "being written", "deleted", "gone", "failed", "skipped", "put off"),
    *("not due", "lost", "beyond", "not done", "unknown"),
)
"""States of a step that is not committed."""

_SAVE_EVENTS = ("commit", "failed", "skipped", "put_off", "deleted")


@dataclass(frozen=True)
class SetAside:
    """A renamed step."""

    what: str
    """``quarantined``, ``rolled back``, ``late`` or ``suspect``."""
    name: str
    reason: str = ""


@dataclass(frozen=True)
class RunFacts:
    """The records that an explanation uses."""

    events: Sequence[Event] = ()
    history: Sequence[AttemptHistory] = ()
    set_aside: Mapping[int, Sequence[SetAside]] = field(default_factory=dict)
    in_flight: Mapping[int, int] = field(default_factory=dict)
    """Step -> the attempt that is writing it, or was writing it when it ended."""
    is_live: bool = False
    """Whether the newest attempt is running."""


@dataclass(frozen=True)
class Absence:
    """Why a step does not exist."""

    state: str
    """One of ``STATES``."""
    text: str
    events: tuple[Event, ...] = ()
    """Ledger events about the step, oldest first."""


def read_facts(run_dir: Path, folder: Path) -> RunFacts:
    """Read what is known of a run's steps. Raises OSError and RunFolderError."""
    listing = paths.list_folder(folder)
    reasons = {
        rejected["moved_to"]: rejected["reason"]
        for row in read_receipts(run_dir)
        for rejected in row.get("rejected", ())
        if rejected.get("moved_to")
    }
    groups = {
        "quarantined": listing.quarantined,
        "rolled back": listing.rolled_back,
        "late": listing.late,
        "suspect": listing.suspect,
    }
    set_aside: dict[int, list[SetAside]] = {}
    for what, members in groups.items():
        for path in sorted(members):
            step = paths.step_number(path.name.split(".")[1])
            if step is not None:
                set_aside.setdefault(step, []).append(SetAside(what, path.name, reasons.get(path.name, "")))
    in_flight: dict[int, int] = {}
    for path, attempt in listing.temporary:
        step = paths.step_number(path.name.split(".")[1])
        if step is not None:
            in_flight[step] = max(attempt, in_flight.get(step, 0))
    events = read_events(run_dir)
    history = derive(events, read_faults(run_dir))
    is_live = bool(history) and history[-1].end is None and bool(lease.live_holder(run_dir))
    return RunFacts(events, history, set_aside, in_flight, is_live)


def explain_absence(step: int, facts: RunFacts, config: CheckpointConfig | None) -> Absence:
    """Return why ``step`` is not among a run's committed steps.

    ``config``: the newest known one, which may differ from that of an older attempt; None if
    unknown.
    """
    about = _events_about(step, facts.events)
    if step in facts.set_aside:
        return Absence("set aside", "; ".join(map(_aside_in_words, facts.set_aside[step])), about)
    if step in facts.in_flight:
        attempt = facts.in_flight[step]
        if facts.is_live and attempt == facts.history[-1].number:
            return Absence("being written", f"attempt {attempt} is writing it", about)
        text = f"attempt {attempt} ended while it was writing it: {_end_of(facts, attempt)}"
        return Absence("lost", text, about)
    if about:
        return Absence(*_by_event(step, about[-1], facts), about)
    return Absence(*_without_event(step, facts, config))


def _events_about(step: int, events: Sequence[Event]) -> tuple[Event, ...]:
    """Return the ledger's events about ``step``. For a deferred save, prefer the event for its end."""
    found = [event for event in events if _is_about(event, step)]
    ended = {
        (event["attempt"], event["from_step"])
        for event in found
        if event["event"] == "put_off" and event["to_step"] is not None
    }
    return tuple(
        event
        for event in found
        if event["event"] != "put_off"
        or event["to_step"] is not None
        or (event["attempt"], event["from_step"]) not in ended
    )


def _is_about(event: Event, step: int) -> bool:
    if event["event"] not in _SAVE_EVENTS:
        return False
    if event["event"] == "put_off":
        last = event["to_step"] if event["to_step"] is not None else event["from_step"]
        return event["from_step"] <= step <= last
    return step in event["steps"] if event["event"] == "deleted" else event["step"] == step


def _aside_in_words(aside: SetAside) -> str:
    why = {
        "quarantined": "it was found damaged at a resume",
        "rolled back": "a rollback went back to an older step",
        "late": "its attempt committed it after the run was taken over or resumed from an older step",
        "suspect": "two attempts resumed from it and failed, and it may be the cause",
    }[aside.what]
    return f"{why}, and it was set aside as {aside.name}{f': {aside.reason}' if aside.reason else ''}"


def _by_event(step: int, event: Event, facts: RunFacts) -> tuple[str, str]:
    attempt, kind = event["attempt"], event["event"]
    if kind == "deleted":
        occasion = (
            f"after step {event['after_commit']} was committed"
            if event["after_commit"] is not None
            else "to make space for a save"
        )
        rules = "; ".join(event["rules"])
        return "deleted", (
            f"attempt {attempt} deleted it {occasion}: no rule kept it (kept: {rules}; the newest)"
        )
    if kind == "commit":
        return "gone", (
            f"attempt {attempt} committed it, but no record says what happened to it: it was deleted just "
            "before a crash, by `kempnerforge ckpt prune`, or by another program"
        )
    if kind == "failed":
        return "failed", f"its save by attempt {attempt} failed: {event['error']}"
    if kind == "skipped":
        return "skipped", f"attempt {attempt} skipped its save for lack of space: {event['why']}"
    writing = f"its save was deferred, because step {event['writing']} was still being written"
    if event["saved_step"] == step:
        return "lost", f"attempt {attempt} ended before its save was committed: {_end_of(facts, attempt)}"
    if event["saved_step"] is not None:
        return "put off", f"{writing}; step {event['saved_step']} was saved instead"
    if event["to_step"] is not None:
        return "put off", f"{writing}; then there was no space for a save"
    if facts.is_live and attempt == facts.history[-1].number:
        return "put off", f"{writing}; the next possible step is saved instead"
    return "put off", f"{writing}; attempt {attempt} ended before another step was saved instead"


def _without_event(step: int, facts: RunFacts, config: CheckpointConfig | None) -> tuple[str, str]:
    trained = [past for past in facts.history if past.began_at is not None]
    if not trained:
        return "unknown", "no attempt of this run has recorded its steps in the ledger"
    newest = trained[-1]
    reached = max(map(_reached, trained))
    passed = [past for past in trained if (past.began_at or 0) < step <= _reached(past)]
    if step == 0:
        passed = [past for past in trained if past.began_at == 0]
    if step > reached:
        if facts.is_live:
            return (
                "beyond",
                f"it is not done yet: attempt {newest.number} is at about step {_reached(newest)}",
            )
        note = " It may have done a few more before it ended." if newest.kind in ("lost", "fault") else ""
        return "beyond", f"no attempt is known to have reached it: the last step is {reached}.{note}"
    if not passed:
        begins = ", ".join(str(past.began_at) for past in trained)
        return "not done", f"no attempt of this run did this step: they began at {begins}"
    last = passed[-1]
    if config is None:
        return (
            "unknown",
            f"attempt {last.number} did it, but no committed step has its config, so the schedule is unknown",
        )
    if (reason := due_by_steps(config, step)) is None:
        return "not due", f"no save was due: {schedule_in_words(config, step)}"
    if any(event["step"] > step for event in last.commits) or last.kind == "finished":
        if config.max_overhead_pct is not None or config.interval == "auto":
            return "not due", "no save was due: the cost of saves increased the interval (max_overhead_pct)"
        return "unknown", (
            f"a save was due ({reason}) by the newest config, but attempt {last.number} recorded none; its "
            "own config may have been different, or its version recorded less"
        )
    if facts.is_live and last is newest:
        return "being written", f"its save ({reason}) is not finished yet"
    return "lost", (
        f"attempt {last.number} ended before its save ({reason}) was committed: {_end_of(facts, last.number)}"
    )


def _reached(attempt: AttemptHistory) -> int:
    return max([attempt.last_step, *(event["step"] for event in attempt.commits)])


def _end_of(facts: RunFacts, attempt: int) -> str:
    found = next((past for past in facts.history if past.number == attempt), None)
    return found.reason if found is not None else "its end is unknown"


def due_by_steps(config: CheckpointConfig, step: int) -> str | None:
    """Return why ``config`` makes a save due after ``step``, regardless of time; None if it does not."""
    from kempnerforge.checkpoint.schedule.save_policy import SavePolicy

    return SavePolicy.from_config(config).due(step, auto_s=math.inf)


def schedule_in_words(config: CheckpointConfig, step: int) -> str:
    """Return when saves are due around ``step``, for a step after which no save is due."""
    parts: list[str] = []
    before, after = _neighbours(config, step)
    if isinstance(config.interval, int) and config.interval:
        parts.append(f"checkpoint.interval is {config.interval}")
    if config.interval == "auto":
        parts.append('checkpoint.interval is "auto", which depends on time')
    if config.interval_minutes is not None:
        parts.append(f"checkpoint.interval_minutes is {config.interval_minutes:g}, which depends on time")
    around = [f"the one before at step {before}"] if before is not None else []
    around += [f"the next one at step {after}"] if after is not None else []
    if around:
        parts.append(", ".join(around))
    return "; ".join(parts) or "the config requests no saves except after the last step"


def _neighbours(config: CheckpointConfig, step: int) -> tuple[int | None, int | None]:
    """Return the nearest steps below and above ``step`` after which the config makes a save due."""
    marks = set(config.at_steps) | ({0} if config.save_first else set())
    if window := config.dyn_ckpt_window:
        powers = (1 << power for power in range(window.stop.bit_length()))
        marks |= {power for power in powers if window.start <= power <= window.stop}
    if isinstance(config.interval, int) and config.interval:
        below = step // config.interval * config.interval
        marks |= {below + config.interval, *({below} if below > 0 else ())}
    below_step = [mark for mark in marks if mark < step]
    return max(below_step, default=None), min((mark for mark in marks if mark > step), default=None)
