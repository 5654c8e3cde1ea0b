"""The lease, held and taken over by real processes: killed, stopped, racing, restarted by SLURM."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.clock import FakeClock
from support.polling import wait_until
from support.tmpfs import mounted_tmpfs

from kempnerforge import fsio, process_identity
from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.retention.start_cleanup import StartCleanup
from kempnerforge.checkpoint.run import lease
from kempnerforge.errors import LeaseHeldError, LeaseLostError, RunFolderError
from kempnerforge.process_identity import ProcessIdentity

pytestmark = pytest.mark.smoke

REPO = Path(__file__).parents[2]
SCRIPT = REPO / "tests/support/lease_process.py"
QUICK = {"renew_every_s": 0.05, "stale_after_s": 0.6}
NEVER_STALE_S = 3600.0
"""As ``stale_after_s``: watching the lease for so long would end in this test's time-out."""


class Process:
    """One ``lease_process.py``."""

    def __init__(self, **env: str) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        self.popen = subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**clean, **env},
        )

    def send(self, do: str, **request: Any) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.popen.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.popen.stdout is not None
        return json.loads(self.popen.stdout.readline())

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        self.send(do, **request)
        return self.answer()

    def acquire(self, folder: Path, **request: Any) -> dict[str, Any]:
        return self.ask("acquire", dir=str(folder), **{**QUICK, **request})

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)
        if number == signal.SIGSTOP:  # one thread stops after the other: until all have
            os.waitid(os.P_PID, self.popen.pid, os.WSTOPPED | os.WNOWAIT)


class Processes:
    """Starts them, and ends them all."""

    def __init__(self) -> None:
        self.started: list[Process] = []

    def __call__(self, **env: str) -> Process:
        self.started.append(Process(**env))
        return self.started[-1]


@pytest.fixture
def process() -> Iterator[Processes]:
    found = Processes()
    yield found
    for one in found.started:
        one.popen.kill()
        one.popen.communicate()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock(0.0).replace_in(monkeypatch, lease)


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_LOOK_EVERY_S", 0.02)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def leases(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("lease*"))


def fill(folder: Path) -> None:
    """Leave no room in the file system that ``folder`` is on."""
    with open(folder / "filler", "wb", buffering=0) as filler:
        try:
            while filler.write(bytes(1 << 12)):
                continue
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def leave_behind(folder: Path, attempt: int = 3, **changes: Any) -> Path:
    """A lease of a holder that is like this process but for ``changes``, and that nobody renews."""
    owner = replace(ProcessIdentity.of_this_process(attempt), **changes)
    path = folder / f"lease.{attempt}.json"
    path.write_bytes(process_identity.encode(owner, counter=7, released=False))
    return path


ELSEWHERE = {"host": "node7", "boot_id": "another-kernel", "pid": 1}


def test_lease_free_is_taken_and_numbers_attempts(tmp_path: Path) -> None:
    first = lease.acquire(tmp_path)
    assert (first.attempt, first.took_over) == (1, "")
    first.check()
    first.release()
    first.release()
    second = lease.acquire(tmp_path)
    assert (second.attempt, second.took_over) == (2, "")
    assert leases(tmp_path) == ["lease.2.json"]
    second.release()
    later = lease.acquire(tmp_path, after_attempt=40)
    assert later.attempt == 41
    later.release()


def test_lease_file_names_holder_and_counts(tmp_path: Path) -> None:
    held = lease.acquire(tmp_path, renew_every_s=0.02)
    before = json.loads((tmp_path / "lease.1.json").read_text())
    assert before["pid"] == os.getpid()
    assert before["attempt"] == 1
    assert not before["released"]
    assert {"host", "boot_id", "started", "start_ticks", "slurm_job_id", "slurm_restart_count"} <= set(before)
    wait_until(
        lambda: json.loads((tmp_path / "lease.1.json").read_text())["counter"] >= "00000000000000000003",
        "a counter that moves",
    )
    size_bytes = (tmp_path / "lease.1.json").stat().st_size
    held.release()
    after = json.loads((tmp_path / "lease.1.json").read_text())
    assert after["released"]
    assert (tmp_path / "lease.1.json").stat().st_size == size_bytes


def test_lease_of_live_process_is_refused(
    tmp_path: Path, process: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    other = process()
    assert other.acquire(tmp_path)["attempt"] == 1
    with pytest.raises(LeaseHeldError) as caught:
        lease.acquire(tmp_path, stale_after_s=NEVER_STALE_S)
    assert isinstance(caught.value, RunFolderError)
    assert caught.value.exit_status == 2
    pid = other.popen.pid
    for part in (
        f"attempt 1, pid {pid} on ",
        "since 20",
        f"(kill {pid} (on ",
        "--run.name=NEW",
        str(tmp_path),
    ):
        assert part in str(caught.value)
    watching = f"watching it for up to {NEVER_STALE_S:g} s"
    assert [watching in message for message in caplog.messages] == [True]
    assert other.ask("check") == {}


def test_lease_of_killed_process_is_taken_at_once(tmp_path: Path, process: Processes) -> None:
    other = process()
    other.acquire(tmp_path)
    other.signal(signal.SIGKILL)
    # Its parent, this process, has not asked for its status: it is still in the table of processes.
    os.waitid(os.P_PID, other.popen.pid, os.WEXITED | os.WNOWAIT)
    held = lease.acquire(tmp_path, stale_after_s=NEVER_STALE_S)
    assert held.attempt == 2
    assert held.took_over.endswith("its process has ended")
    assert f"pid {other.popen.pid}" in held.took_over
    held.release()


def test_lease_of_stopped_process_is_taken_and_lost(tmp_path: Path, process: Processes) -> None:
    stopped, taker = process(), process()
    assert stopped.acquire(tmp_path)["attempt"] == 1
    stopped.signal(signal.SIGSTOP)
    taken = taker.acquire(tmp_path)
    assert taken["attempt"] == 2
    assert "its lease has not moved for 0.6 s" in taken["took_over"]
    stopped.signal(signal.SIGCONT)
    wait_until(lambda: stopped.ask("lost")["lost"], "the old holder's renewal to find out")
    lost = stopped.ask("check")
    assert lost["error"] == "LeaseLostError"
    assert "commits nothing any more" in lost["text"]
    assert taker.ask("check") == {}, "the old holder must not touch the new lease"
    assert leases(tmp_path) == ["lease.2.json"]
    assert stopped.ask("release") == {}
    assert taker.ask("check") == {}


@pytest.mark.parametrize("before", ["nothing", "dead", "stale", "unreadable", "released"])
def test_lease_racing_processes_exactly_one_wins(tmp_path: Path, process: Processes, before: str) -> None:
    racers = [process() for _ in range(3)]
    # Where somebody has to wait, a winner that gets no processor for so long would look dead.
    rounds, stale_after_s = (3, 0.6) if before in ("stale", "unreadable") else (5, NEVER_STALE_S)
    for number in range(rounds):
        folder = tmp_path / str(number)
        folder.mkdir()
        least = 1
        if before == "dead":
            leave_behind(folder, start_ticks=1)
            least = 4
        elif before == "stale":
            leave_behind(folder, **ELSEWHERE)
            least = 4
        elif before == "unreadable":
            (folder / "lease.3.json").touch()
            least = 4
        elif before == "released":
            lease.acquire(folder).release()
            least = 2
        for racer in racers:
            racer.send("acquire", dir=str(folder), renew_every_s=0.03, stale_after_s=stale_after_s)
        answers = [racer.answer() for racer in racers]
        winners = [racer for racer, answer in zip(racers, answers, strict=True) if "attempt" in answer]
        assert len(winners) == 1, answers
        assert [answer.get("attempt") for answer in answers if "attempt" in answer] == [least]
        assert {answer.get("error") for answer in answers} == {None, "LeaseHeldError"}
        assert winners[0].ask("check") == {}
        assert leases(folder) == [f"lease.{least}.json"]
        winners[0].ask("release")


def test_lease_reused_pid_is_another_process(tmp_path: Path) -> None:
    now = ProcessIdentity.of_this_process(0)
    leave_behind(tmp_path, start_ticks=now.start_ticks - 1)
    held = lease.acquire(tmp_path, stale_after_s=NEVER_STALE_S)
    assert held.took_over.endswith("its process has ended")
    held.release()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        ELSEWHERE,
        {"boot_id": "before-the-reboot", "start_ticks": 1},
        {"pid_namespace": "pid:[1]", "pid": 99999999},
        {"boot_id": ""},
        {"start_ticks": -1},
    ],
    ids=["alive here", "another host", "another boot", "a container", "no boot id", "no start time"],
)
def test_lease_unknown_process_counter_decides(
    tmp_path: Path, clock: FakeClock, changes: dict[str, Any]
) -> None:
    """Where it cannot be known whether the process lives, the lease is watched for as long as is set."""
    leave_behind(tmp_path, **changes)
    assert lease.live_holder(tmp_path).startswith("attempt 3, pid ")
    held = lease.acquire(tmp_path, stale_after_s=30)
    assert clock.now == pytest.approx(30, abs=0.1)
    assert held.took_over.endswith("its lease has not moved for 30 s")
    held.release()
    assert lease.live_holder(tmp_path) == ""


def test_lease_hanging_read_is_not_evidence(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The storage hangs for everybody, the holder too: it must be seen not to move for long enough after that.
    left = leave_behind(tmp_path, **ELSEWHERE)
    read_mark, began = fsio.read_mark, []

    def hang_once(path: Path) -> bytes:
        if path == left:
            began.append(clock.now)
            if len(began) == 2:
                clock.sleep(25)
        return read_mark(path)

    monkeypatch.setattr(fsio, "read_mark", hang_once)
    held = lease.acquire(tmp_path, stale_after_s=30)
    assert began[2] >= 25
    assert began[-1] - began[2] == pytest.approx(30, abs=0.1)
    held.release()


def test_lease_requeued_slurm_job_takes_over_at_once(tmp_path: Path, process: Processes) -> None:
    first = process(SLURM_JOB_ID="77")
    first.acquire(tmp_path)
    again = process(SLURM_JOB_ID="77", SLURM_RESTART_COUNT="1")
    taken = again.acquire(tmp_path, stale_after_s=NEVER_STALE_S)
    assert (taken["attempt"], taken["logged"]) == (2, "")
    assert "its SLURM job has been restarted" in taken["took_over"]
    assert first.ask("check")["error"] == "LeaseLostError"


@pytest.mark.parametrize(
    ("job", "count", "command"),
    [("77", "2", "kill "), ("77", "1", "kill "), ("78", "5", "scancel 77")],
    ids=["same start", "earlier start", "another job"],
)
def test_lease_other_slurm_start_is_refused(
    tmp_path: Path, process: Processes, job: str, count: str, command: str
) -> None:
    process(SLURM_JOB_ID="77", SLURM_RESTART_COUNT="2").acquire(tmp_path)
    refused = process(SLURM_JOB_ID=job, SLURM_RESTART_COUNT=count).acquire(
        tmp_path, stale_after_s=NEVER_STALE_S
    )
    assert refused["error"] == "LeaseHeldError"
    assert "SLURM job 77" in refused["text"]
    assert f"({command}" in refused["text"]


def test_lease_late_claim_below_highest_is_refused(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that sleeps before it creates its file does not get a number below the highest."""
    leave_behind(tmp_path, 3, start_ticks=1)
    open_file = fsio.open_file

    def sleep_first(path: Path, flags: int, *args: Any) -> int:
        if path.name == "lease.4.json":
            # Others take 4 and then 5 meanwhile, and unlink what is below.
            leave_behind(tmp_path, 5, **ELSEWHERE)
            (tmp_path / "lease.3.json").unlink()
        return open_file(path, flags, *args)

    monkeypatch.setattr(fsio, "open_file", sleep_first)
    held = lease.acquire(tmp_path, stale_after_s=30)
    assert held.attempt == 6
    assert held.took_over.startswith("attempt 5, pid 1 on node7")
    assert clock.now == pytest.approx(30, abs=0.1), "attempt 5 is watched like any other"
    assert leases(tmp_path) == ["lease.6.json"]
    held.check()
    held.release()


def test_lease_file_deleted_is_lost(tmp_path: Path) -> None:
    held = lease.acquire(tmp_path)
    (tmp_path / "lease.1.json").unlink()
    with pytest.raises(LeaseLostError, match="was removed"):
        held.check()
    held.release()


@pytest.mark.parametrize("own_file", ["readable", "unreadable"])
def test_lease_failed_renewal_still_finds_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_file: str
) -> None:
    """On NFS the renewal of a holder whose file was unlinked fails for ever, with ESTALE."""
    held = lease.acquire(tmp_path, renew_every_s=0.02)

    def fail(*_args: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        if own_file == "unreadable":
            patch.setattr(Path, "read_bytes", fail)
        wait_until(lambda: "Stale file handle" in held.failing, "a renewal that fails")
        assert held.lost == "", "a failed renewal alone ends no lease"
        leave_behind(tmp_path, 2, **ELSEWHERE)
        wait_until(lambda: held.lost, "the holder to learn of its successor")
        assert "attempt 2 has taken" in held.lost
    held.release()


def test_lease_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be read"):
        lease.acquire(tmp_path / "missing")


def test_lease_disk_full_holder_still_looks_alive(tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "disk", "size=1m") as disk:
        held = lease.acquire(disk, renew_every_s=0.02)
        fill(disk)
        with pytest.raises(LeaseHeldError):
            lease.acquire(disk, stale_after_s=60)
        assert held.failing == ""
        held.release()


def test_fence_late_commit_of_old_holder_fails(tmp_path: Path, process: Processes, clock: FakeClock) -> None:
    checkpoints = tmp_path / "checkpoints"
    temporary = checkpoints / paths.temporary_name("step_00000004", 1)
    temporary.mkdir(parents=True)
    (temporary / "shard").write_bytes(b"x")
    zombie = process()
    zombie.acquire(tmp_path)
    assert zombie.ask("check") == {}, "it may commit: the check comes before the rename"
    zombie.signal(signal.SIGSTOP)
    held = lease.acquire(tmp_path, stale_after_s=30)
    assert clock.now >= 29.9
    mine = checkpoints / paths.temporary_name("step_00000008", held.attempt)
    mine.mkdir()
    fenced = StartCleanup(checkpoints, attempt=held.attempt).revoke_inflight()
    zombie.signal(signal.SIGCONT)
    late = zombie.ask("rename", **{"from": str(temporary), "to": str(checkpoints / "step_00000004")})
    assert late["error"] == "FileNotFoundError"
    assert [path.name for path in fenced] == [".step_00000004.1.tmp.2.deleting"]
    listing = paths.list_folder(checkpoints)
    assert listing.steps == []
    assert listing.deleting == fenced, "the sweep must find it"
    assert listing.temporary == [(mine, 2)]
    held.release()
