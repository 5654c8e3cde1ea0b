"""When waiting for a stop is over, when a last save has to start, what is a hang: tables."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.clock import FakeClock

from kempnerforge.checkpoint.run import attempt_start
from kempnerforge.checkpoint.run.attempt_start import attempt_started
from kempnerforge.checkpoint.run.request_files import RequestFiles
from kempnerforge.slurm import deadline as slurm_deadline
from kempnerforge.slurm.deadline import end_in_environment, parse_end
from kempnerforge.slurm.job import SlurmJob
from kempnerforge.train import evaluation as evaluation_module
from kempnerforge.train.evaluation import MOST_BATCHES, InterruptibleBatches, batches_between_queries
from kempnerforge.train.hangs import progress as progress_module
from kempnerforge.train.hangs.detector import describe_lag
from kempnerforge.train.hangs.progress import Position, Progress, limit_s
from kempnerforge.train.termination import deadline as deadline_module
from kempnerforge.train.termination import stop_request as stop_file_module
from kempnerforge.train.termination.deadline import Deadline, latest_start, p99
from kempnerforge.train.termination.signals import STOP_SIGNALS, ShutdownTimer, StopSignals
from kempnerforge.train.termination.stop_request import StopFile

TERM, INT, HUP, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1


@pytest.mark.parametrize(
    ("arrivals", "ends_after_s"),
    [
        ([(0, TERM)], None),
        ([(0, TERM), (0.01, TERM), (4.9, TERM)], None),  # from the terminal, from torchrun, from srun
        ([(0, INT), (0.01, INT), (0.02, TERM)], None),
        ([(0, TERM), (5, TERM)], 5),
        ([(0, INT), (6, TERM)], 6),
        ([(0, HUP), (1, HUP), (7, INT)], 7),
        ([(0, USR1), (100, USR1)], None),  # announcements
        ([(0, USR1), (100, TERM)], None),  # the announced end
        ([(0, USR1), (100, TERM), (101, TERM)], None),
        ([(0, USR1), (100, TERM), (105, TERM)], 105),
        ([(0, TERM), (10, USR1)], None),
        ([(0, signal.SIGUSR2), (10, signal.SIGCONT)], None),
    ],
)
def test_patience_second_signal_ends_wait(
    arrivals: list[tuple[float, signal.Signals]], ends_after_s: float | None
) -> None:
    patience = ShutdownTimer(1000.0, again_after_s=5.0)
    ends = [at for at, number in arrivals if patience.arrived(number, at) is not None]
    assert ends == ([] if ends_after_s is None else [ends_after_s])


def test_patience_clock_starts_at_first_ending_signal() -> None:
    patience = ShutdownTimer(25.0)
    assert patience.ends_at is None
    patience.arrived(USR1, 100.0)
    patience.agreed(USR1, 101.0)
    assert patience.ends_at is None
    patience.arrived(TERM, 200.0)
    patience.arrived(TERM, 201.0)
    assert patience.ends_at == 225.0
    assert "SIGTERM" in patience.timeout_reason


def test_patience_signal_of_other_rank_starts_clock() -> None:
    """And it is not the first of two."""
    patience = ShutdownTimer(25.0, again_after_s=5.0)
    patience.agreed(TERM, 10.0)
    assert patience.ends_at == 35.0
    assert patience.arrived(TERM, 16.0) is None, "SLURM reaches the nodes one after the other"
    assert patience.arrived(TERM, 21.0) is not None
    assert patience.ends_at == 35.0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], 0.0),
        ([3.0], 3.0),
        ([1.0, 9.0, 2.0], 9.0),
        ([float(i) for i in range(1, 101)], 99.0),
        ([float(i) for i in range(1, 1001)], 990.0),
    ],
)
def test_p99_table_matches(values: list[float], expected: float) -> None:
    assert p99(values) == expected


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"saves_s": [], "steps_s": [2.0], "margin_s": 10.0}, 988.0),
        ({"saves_s": [30.0, 20.0], "steps_s": [2.0, 5.0], "margin_s": 10.0}, 955.0),
        ({"saves_s": [30.0], "steps_s": [5.0], "margin_s": 0.0}, 965.0),
        ({"saves_s": [30.0], "steps_s": [5.0], "margin_s": 0.0, "save_is_pending": True}, 935.0),
        ({"saves_s": [900.0], "steps_s": [200.0], "margin_s": 0.0}, -100.0),
    ],
)
def test_deadline_latest_start_table_matches(known: dict[str, Any], expected: float) -> None:
    assert latest_start(1000.0, **known) == expected


def test_deadline_not_due_before_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(1600.0).replace_in(monkeypatch, deadline_module)
    over = Deadline(started=1000.0, max_minutes=1, margin_s=60, environ={})
    assert not over.is_due(save_is_pending=False)
    over.step_begins()
    clock.advance(2.0)
    assert not over.is_due(save_is_pending=False)
    over.step_ends()
    assert over.is_due(save_is_pending=False)


def test_deadline_earlier_end_counts() -> None:
    def end_of(max_minutes: float | None, job_end: float | None) -> float | None:
        job = {"SLURM_JOB_ID": "1", "PATH": "/nowhere"} if job_end is not None else {}
        environ = {**job, "SLURM_JOB_END_TIME": f"{job_end:.0f}" if job_end is not None else ""}
        deadline = Deadline(started=1000.0, max_minutes=max_minutes, margin_s=1, environ=environ)
        try:
            return deadline.at
        finally:
            deadline.close()

    assert end_of(None, None) is None
    assert end_of(1, None) == 1060
    later = float(int(time.time()) + 5000)
    assert end_of(None, later) == later
    assert end_of(1, later) == 1060
    assert end_of(later, later) == later


@pytest.mark.parametrize("text", ["2026-03-04T05:06:07\n", "2026-03-04T05:06:07\n2026-03-04T09:00:00\n"])
def test_slurm_end_squeue_local_time_parsed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        with monkeypatch.context() as patch:
            patch.setenv("TZ", "UTC-2")
            time.tzset()
            assert parse_end(text) == 1772593567.0  # 03:06:07 UTC
    finally:
        time.tzset()


def test_slurm_end_that_is_past_is_ignored_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_deadline.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
    stale = {"SLURM_JOB_END_TIME": "1000"}
    end = slurm_deadline.JobEnd(SlurmJob("7", 0, ()), stale)
    assert end.at is None
    assert "SLURM_JOB_END_TIME is in the past" in end.problem
    coming = str(int(time.time()) + 1000)
    assert slurm_deadline.JobEnd(SlurmJob("7", 0, ()), {"SLURM_JOB_END_TIME": coming}).at == float(coming)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_stop_signals_ignored_at_start_stay_ignored(number: signal.Signals) -> None:
    before = {one: signal.getsignal(one) for one in (*STOP_SIGNALS, signal.SIGUSR2)}
    wakeup = signal.set_wakeup_fd(-1)
    try:
        signal.signal(number, signal.SIG_IGN)
        signals = StopSignals()
        signals.install()
        assert signal.getsignal(number) is signal.SIG_IGN
        os.kill(os.getpid(), number)
        assert signals.received == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        signal.set_wakeup_fd(wakeup)


def test_slurm_end_missing_is_none() -> None:
    for text in ("N/A\n", "NONE\n", "Unknown\n"):
        assert parse_end(text) is None
    for text in ("", "tomorrow\n"):
        with pytest.raises(ValueError):
            parse_end(text)
    assert end_in_environment({}) is None
    assert end_in_environment({"SLURM_JOB_END_TIME": "1772593567"}) == 1772593567.0


def test_stop_file_made_before_start_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the file system's clock, which is far ahead of this one."""
    FakeClock(2000.0).replace_in(monkeypatch, stop_file_module)
    started = 1500.0
    request = tmp_path / "stop.request"
    file = StopFile(tmp_path)
    assert not file.remove_stale(started)
    request.write_text("")
    assert not file.remove_stale(started)
    requests = RequestFiles(tmp_path)
    file.watch(requests)
    assert file.is_there()
    made = request.stat().st_mtime - 1000
    os.utime(request, (made, made))
    assert file.remove_stale(started)
    requests.look()
    assert not file.is_there()
    assert list(tmp_path.iterdir()) == []
    requests.close()


def test_attempt_started_under_torchrun_is_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun is the parent of its workers, and started before them."""
    FakeClock(5000.0).replace_in(monkeypatch, attempt_start)
    starts_s = {os.getpid(): 300, os.getppid(): 200}
    ticks = os.sysconf("SC_CLK_TCK")
    state = lambda pid: SimpleNamespace(start_ticks=starts_s[pid] * ticks)  # noqa: E731
    monkeypatch.setattr(attempt_start, "process_state", state)
    assert attempt_started({}) == 1000.0 + 300
    assert attempt_started({"TORCHELASTIC_RUN_ID": "x"}) == 1000.0 + 200
    monkeypatch.setattr(attempt_start, "process_state", lambda _: None)
    assert attempt_started({}) == 5000.0, "now, where it is not known"


@pytest.mark.parametrize(
    ("took_s", "expected"),
    [
        ([], 900.0),
        ([0.1, 0.2, 0.3], 60.0),
        ([8.0, 10.0, 1000.0], 100.0),
        ([600.0], 900.0),
    ],
)
def test_hang_limit_table_matches(took_s: list[float], expected: float) -> None:
    assert limit_s(took_s, multiple=10, floor_s=60, ceiling_s=900) == expected


def post(position: Position, done: float = 0.0, save_part: str = "done") -> dict[str, Any]:
    return {"order": position.order, "done": done, "where": str(position), "save_part": save_part}


BACKWARD, DATA = Position("step", 7, "forward_backward"), Position("step", 7, "data")
AGREE, EVAL = Position("agree", 6), Position("eval", 6)


@pytest.mark.parametrize(
    ("posts", "lags"),
    [
        ([post(BACKWARD, 0.4), post(BACKWARD, 0.3), post(BACKWARD, 0.4)], "Rank 1 lags"),
        ([post(BACKWARD), post(BACKWARD), post(DATA, 0.9)], "Rank 2 lags: it is at step 7, data"),
        ([post(AGREE), post(EVAL), post(AGREE)], "Rank 1 lags: it is at eval 6"),
        ([post(AGREE), post(BACKWARD), post(DATA)], "Rank 0 lags: it is at agree 6"),
        ([post(BACKWARD, 0.4)] * 3, "All ranks are at the same position (step 7, forward_backward)"),
        ([post(DATA), post(BACKWARD), post(DATA)], "2 ranks (0, 2) lag"),
        ([post(BACKWARD), None, post(DATA)], "Rank 1 does not answer"),
    ],
)
def test_hang_lagging_rank_named(posts: list[dict[str, Any] | None], lags: str) -> None:
    answers = {rank: one for rank, one in enumerate(posts) if one is not None}
    assert lags in describe_lag(answers, 3)


def test_hang_lagging_rank_in_save_named() -> None:
    parts = {0: post(DATA, save_part="commit"), 1: post(BACKWARD, save_part="write")}
    assert "Rank 1 lags: still at its write" in describe_lag(parts, 2, saving=True)
    parts = {0: post(DATA, save_part="commit"), 1: post(DATA, save_part="done")}
    assert "rank 0 has not committed" in describe_lag(parts, 2, saving=True)


def test_progress_activities_measured_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(100.0).replace_in(monkeypatch, progress_module)
    issued = 0
    progress = Progress(lambda: issued)
    for step in (1, 2, 3):
        progress.begin("step", step)
        progress.phase("data")
        issued += 5
        clock.advance(2.0 * step)
        progress.begin("agree", step)
        issued += 1
        clock.advance(0.5)
    progress.begin("step", 4)
    assert progress.collectives_per_step == 6
    assert progress.took_s("step") == [2.0, 4.0, 6.0]
    assert progress.took_s("agree") == progress.took_s("step"), "the others may be that far behind"
    assert progress.took_s("eval") == []
    progress.saved(12.0)
    assert progress.took_s("save") == [12.0]


# -- validations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "batches"),
    [(90.0, 1), (1.0, 1), (0.3, 3), (0.05, 20), (1e-4, MOST_BATCHES), (0, MOST_BATCHES)],
)
def test_validation_looks_for_a_stop_once_a_second(seconds: float, batches: int) -> None:
    assert batches_between_queries(seconds) == batches


def test_validation_ends_at_the_look_that_says_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slowest rank decides after how many batches all ranks query again."""
    clock = FakeClock().replace_in(monkeypatch, evaluation_module)
    answers = iter([(False, 500), (False, 500), (True, 0)])
    told: list[int] = []

    def query_stop(milliseconds: int) -> tuple[bool, int]:
        told.append(milliseconds)
        return next(answers)

    batches: Any = InterruptibleBatches(range(100), query_stop)  # type: ignore[arg-type]
    seen = []
    for number in batches:
        clock.sleep(0.25)
        seen.append(number)
    assert batches.interrupted
    assert seen == [0, 1, 2, 3, 4, 5, 6]  # looks after 1, 2 and 4 more
    assert told == [250, 500, 1000]
