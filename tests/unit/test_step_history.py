"""Why a step is not there: what the ledger, the folders and the config say, and what follows."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kempnerforge.checkpoint.results import SaveReport
from kempnerforge.checkpoint.run.save_events import PutOff, event_of
from kempnerforge.checkpoint.tools.step_history import RunFacts, SetAside, explain_absence, schedule_in_words
from kempnerforge.config.schema import CheckpointConfig
from kempnerforge.goodput import crash_loop_guard
from kempnerforge.goodput.history import derive, last_step_done

Event = dict[str, Any]


def event(name: str, attempt: int = 1, **values: Any) -> Event:
    return {"event": name, "attempt": attempt, "time": 1000.0 + attempt, **values}


def attempt(number: int, began: int, last: int, *events: Event, end: str | None = None) -> list[Event]:
    """An attempt from ``began`` to ``last``, which was killed unless ``end`` says how it ended."""
    found = [event("start", number, loop="own"), event("resume", number, step=began), *events]
    found.append(event("progress", number, step=last, spent_s={"step": 1.0}))
    if end is not None:
        found.append(event("end", number, kind=end, reason=f"it {end}", step=last))
    return found


def facts(*attempts: list[Event], **more: Any) -> RunFacts:
    events = [each for one in attempts for each in one]
    return RunFacts(events, derive(events, []), **more)


def put_off(saved: int | None, last: int | None = 22) -> Event:
    return event("put_off", from_step=20, to_step=last, reason="interval", writing=10, saved_step=saved)


COMMIT = event("commit", step=20, reason="interval")
DELETED = event("deleted", steps=[10, 20], rules=["the last 2"], after_commit=40)
LATER = event("commit", step=40, reason="interval")
KILLED = "no end was recorded"

TABLE: list[tuple[str, RunFacts, str, str]] = [
    (
        "deleted",
        facts(attempt(1, 0, 50, COMMIT, DELETED)),
        "deleted",
        "after step 40 was committed.*the last 2",
    ),
    (
        "deleted for space",
        facts(attempt(1, 0, 50, COMMIT, {**DELETED, "after_commit": None})),
        "deleted",
        "to make space",
    ),
    ("committed and gone", facts(attempt(1, 0, 50, COMMIT)), "gone", "ckpt prune"),
    ("done again", facts(attempt(1, 0, 50, COMMIT, DELETED), attempt(2, 10, 30)), "deleted", "attempt 1"),
    (
        "failed",
        facts(attempt(1, 0, 50, event("failed", step=20, reason="interval", error="no disk"))),
        "failed",
        "attempt 1 failed: no disk",
    ),
    (
        "skipped",
        facts(attempt(1, 0, 50, event("skipped", step=20, reason="interval", why="1 MB free"))),
        "skipped",
        "lack of space: 1 MB free",
    ),
    ("put off", facts(attempt(1, 0, 50, put_off(23))), "put off", "step 10 was still .*; step 23 was saved"),
    ("put off, no space", facts(attempt(1, 0, 50, put_off(None))), "put off", "no space"),
    ("put off, killed", facts(attempt(1, 0, 20, put_off(None, None))), "put off", "attempt 1 ended before"),
    (
        "put off, live",
        facts(attempt(1, 0, 20, put_off(None, None)), is_live=True),
        "put off",
        "the next possible step",
    ),
    ("put off, then lost", facts(attempt(1, 0, 20, put_off(20, 20))), "lost", KILLED),
    ("lost", facts(attempt(1, 0, 25)), "lost", rf"before its save \(interval\) was committed: {KILLED}"),
    ("not finished yet", facts(attempt(1, 0, 25), is_live=True), "being written", "not finished yet"),
    ("in flight", facts(attempt(1, 0, 20), in_flight={20: 1}), "lost", f"while it was writing it: {KILLED}"),
    ("writing", facts(attempt(1, 0, 20), in_flight={20: 1}, is_live=True), "being written", "is writing it"),
    ("beyond", facts(attempt(1, 0, 15, end="stopped")), "beyond", "the last step is 15.$"),
    ("beyond a kill", facts(attempt(1, 0, 15)), "beyond", "a few more before it ended"),
    ("not yet", facts(attempt(1, 0, 15), is_live=True), "beyond", "not done yet: .*at about step 15"),
    ("began later", facts(attempt(1, 30, 50)), "not done", "they began at 30"),
    ("no record", facts(attempt(1, 0, 50, LATER)), "unknown", "recorded none"),
    ("no ledger", facts(), "unknown", "no attempt"),
    *(
        (
            what,
            facts(
                attempt(1, 0, 50, COMMIT), set_aside={20: [SetAside(what, f"{what}.step_00000020.1", "why")]}
            ),
            "set aside",
            f"{said}.*{what}.step_00000020.1: why",
        )
        for what, said in [
            ("quarantined", "damaged"),
            ("rolled back", "rollback"),
            ("late", "taken over"),
            ("suspect", "it may be the cause"),
        ]
    ),
]


@pytest.mark.parametrize(("case", "known", "state", "text"), TABLE, ids=[row[0] for row in TABLE])
def test_absent_step_is_explained(case: str, known: RunFacts, state: str, text: str) -> None:
    found = explain_absence(20, known, CheckpointConfig(interval=10))
    assert found.state == state, case
    assert re.search(text, found.text), found.text


def test_absent_step_without_config_is_unknown() -> None:
    assert explain_absence(20, facts(attempt(1, 0, 50)), None).state == "unknown"


def test_put_off_end_replaces_its_beginning() -> None:
    known = facts(attempt(1, 0, 50, put_off(None, None), put_off(23)))
    (told,) = explain_absence(20, known, None).events
    assert told["saved_step"] == 23
    assert explain_absence(22, known, None).state == "put off"
    assert explain_absence(23, known, CheckpointConfig(interval=10)).state == "not due"


def test_stretched_interval_is_named() -> None:
    known = facts(attempt(1, 0, 50, LATER))
    config = CheckpointConfig(interval=10, max_overhead_pct=1.0)
    assert "max_overhead_pct" in explain_absence(20, known, config).text


SCHEDULES: list[tuple[dict[str, Any], str]] = [
    ({"interval": 10}, "checkpoint.interval is 10; the one before at step 10, the next one at step 20"),
    ({"interval": 100}, "checkpoint.interval is 100; the next one at step 100"),
    ({"interval": 0}, "the config requests no saves except after the last step"),
    (
        {"interval": 0, "save_first": True, "at_steps": [30]},
        "the one before at step 0, the next one at step 30",
    ),
    ({"interval": 0, "dyn_ckpt_window": {"stop": 40}}, "the one before at step 8, the next one at step 16"),
    ({"interval": "auto"}, 'checkpoint.interval is "auto", which depends on time'),
    ({"interval": 0, "interval_minutes": 5.0}, "checkpoint.interval_minutes is 5, which depends on time"),
]


@pytest.mark.parametrize(("settings", "expected"), SCHEDULES)
def test_schedule_in_words_names_neighbours(settings: dict[str, Any], expected: str) -> None:
    assert schedule_in_words(CheckpointConfig.model_validate(settings), 15) == expected


def test_last_step_done_follows_newest_attempt() -> None:
    one, two = attempt(1, 0, 50), attempt(2, 10, 20, event("commit", 2, step=21))
    started = [event("start", 3)]
    assert last_step_done(facts().history) == 0
    assert last_step_done(facts(one).history) == 50
    assert last_step_done(facts(one, two, started).history) == 21
    assert last_step_done(facts(one, two).history, [(3, 12)]) == 12, "a rollback gave the rest up"
    assert last_step_done(facts(one, two).history, [(2, 5)]) == 21


def test_own_loop_faults_make_no_step_suspect() -> None:
    history = facts(*[attempt(number, 8, 9, end="fault") for number in (1, 2, 3)]).history
    assert crash_loop_guard.suspects(history) == {}
    assert crash_loop_guard.without_progress(history, newest_committed=8) == []


def test_save_events_tell_every_outcome() -> None:
    common = {"reason": "interval", "blocking_s": 0.1}
    assert event_of(SaveReport(5, **common, error="no disk")).kind == "failed"
    assert event_of(SaveReport(5, **common, skipped="full")).values["why"] == "full"
    commit = event_of(SaveReport(5, **common, overhead_s=1.0, overhead_is_lower_bound=True))
    assert (commit.kind, commit.values["step"], commit.values["tax_s"]) == ("commit", 5, None)
    waiting = PutOff("interval", writing=10, first=20, last=22)
    assert waiting.begins().values["to_step"] is None
    assert waiting.ends(23).values == {
        "from_step": 20,
        "to_step": 22,
        "reason": "interval",
        "writing": 10,
        "saved_step": 23,
    }
