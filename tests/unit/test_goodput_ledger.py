"""The policies of goodput: tables of what happened and what follows."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from kempnerforge.checkpoint.run.metadata import RunRecord
from kempnerforge.config.schema import load_job
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.distributed.context import DistributedContext
from kempnerforge.goodput import crash_loop_guard
from kempnerforge.goodput.blame import may_lie_in_state
from kempnerforge.goodput.event_log import Ledger, read_events
from kempnerforge.goodput.faults import FaultRecord, is_peer_loss, read_faults, record_fault
from kempnerforge.goodput.history import AttemptHistory, derive
from kempnerforge.goodput.interval import daly, rate_bounds, young
from kempnerforge.goodput.run_history import RunHistory
from kempnerforge.train.attempt_recorder import AttemptRecorder


def history(*attempts: tuple[str, int, list[int], bool], unblocked: int = 0) -> list[AttemptHistory]:
    """Attempts as (kind, began at, committed steps, healthy). ``NonFiniteError`` is a fault of that class."""
    events: list[dict[str, Any]] = []
    for number, (kind, began, commits, healthy) in enumerate(attempts, 1):
        common = {"attempt": number, "time": float(number)}
        events += [{"event": "start", **common}, {"event": "resume", "step": began, **common}]
        events += [{"event": "commit", "step": step, **common} for step in commits]
        events += [{"event": "healthy", "step": began + 10, **common}] if healthy else []
        if kind == N:
            events.append({"event": "end", "kind": F, "error": N, "reason": "nan", "step": began, **common})
        elif kind != "lost":
            events.append({"event": "end", "kind": kind, "reason": kind, "step": began, **common})
    if unblocked:
        events.append({"event": "unblock", "attempt": unblocked, "time": 99.0})
    return derive(events, [])


F = "fault"
N = "NonFiniteError"
ROWS: list[tuple[list[tuple[str, int, list[int], bool]], list[int]]] = [
    ([], []),
    ([(F, 0, [], False)] * 3, [1, 2, 3]),
    ([(F, 0, [4], True), (F, 4, [], False)], [2]),
    ([(F, 0, [], False), (F, 0, [], False), (F, 0, [4], True)], []),
    # What is not the run's own fault neither counts nor breaks the row.
    ([(F, 8, [], False), ("lost", 8, [], False), ("config", 8, [], False), (F, 8, [], False)], [1, 4]),
    ([("lost", 8, [], False), ("stopped", 8, [], False), ("deadline", 8, [], False)], []),
    # A step that was committed before is no progress.
    ([(F, 8, [], False), (F, 8, [], False), (F, 4, [8], True), (F, 8, [], False)], [1, 2, 3, 4]),
]


@pytest.mark.parametrize(("attempts", "expected"), ROWS)
def test_breaker_attempts_without_progress_counted(attempts: list[Any], expected: list[int]) -> None:
    found = history(*attempts)
    newest = max([0, *(step for one in attempts for step in (one[1], *one[2]))])
    row = crash_loop_guard.without_progress(found, newest_committed=newest)
    assert [one.number for one in row] == expected
    assert bool(crash_loop_guard.refusal(row, limit=3, run_dir="r")) is (len(expected) >= 3)
    assert crash_loop_guard.refusal(row, limit=0, run_dir="r") == ""


def test_breaker_unblocked_run_counts_anew() -> None:
    attempts = [(F, 0, [], False)] * 4
    row = crash_loop_guard.without_progress(history(*attempts, unblocked=3), newest_committed=0)
    assert [one.number for one in row] == [4]


@pytest.mark.parametrize(
    ("attempts", "expected"),
    [
        ([(N, 8, [], False)], []),
        ([(N, 8, [], False)] * 2, [8]),
        ([(N, 8, [], False), ("lost", 8, [], False), (F, 8, [], False), (N, 8, [], False)], [8]),
        ([(N, 8, [], False), (N, 8, [], True)], []),
        ([(N, 0, [], False)] * 2, []),
        ([(N, 8, [], False), (N, 8, [], False), (N, 4, [8], True)], []),
        ([(N, 8, [], False), (F, 8, [], False)], []),
        ([(F, 8, [], False)] * 3, []),
        ([("lost", 8, [], False)] * 3, []),
    ],
)
def test_breaker_suspect_steps_found(attempts: list[Any], expected: list[int]) -> None:
    assert list(crash_loop_guard.suspects(history(*attempts))) == expected


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        ("NonFiniteError", True),
        ("DamagedCheckpointError", True),
        ("MismatchError", True),
        ("", False),  # a signal, SIGKILL by the OOM killer, a lost node
        ("OutOfMemoryError", False),  # torch's, on CUDA
        ("MemoryError", False),
        ("AcceleratorError", False),
        ("DistBackendError", False),
        ("DistStoreError", False),
        ("RuntimeError", False),
        ("ValueError", False),  # the user's code
        ("KeyboardInterrupt", False),
        ("DataError", False),
        ("UnreachableCheckpointError", False),
        ("SaveFailedError", False),
        ("LeaseLostError", False),
    ],
)
def test_blame_only_causes_in_state_count(error: str, blamed: bool) -> None:
    assert may_lie_in_state(error, began_at=8, healthy=False) is blamed
    assert not may_lie_in_state(error, began_at=8, healthy=True)
    assert not may_lie_in_state(error, began_at=0, healthy=False)
    assert not may_lie_in_state(error, began_at=None, healthy=False)


def test_faults_class_of_exception_read_back(tmp_path: Path) -> None:
    """The class decides who is blamed; the record of one rank goes before the words of rank 0."""
    record_fault(tmp_path, MemoryError("no"), attempt=1, rank=1, host="a")
    (fault,) = read_faults(tmp_path)
    start = {"event": "start", "attempt": 1, "time": 0.0}
    end = {"event": "end", "attempt": 1, "time": 9.0, "kind": F, "error": N, "reason": "", "step": 1}
    (found,) = derive([start, end], [fault])
    assert (fault.type_name, found.error_type) == ("MemoryError", "MemoryError")
    assert derive([start, end], [])[0].error_type == N


def test_history_cause_is_earliest_own_fault() -> None:
    """A record of a peer's loss is a consequence and never the cause."""
    start = {"event": "start", "attempt": 1, "time": 0.0}
    lost = {"event": "end", "attempt": 1, "time": 9.0, "kind": "lost", "reason": "peer", "step": 1}
    peer = FaultRecord(1, 0, "a", 1.0, "RuntimeError: Connection closed by peer", True, "f")
    own = FaultRecord(1, 3, "b", 2.0, "ValueError: x", False, "g")
    (found,) = derive([start, lost], [peer, own])
    assert (found.kind, found.cause) == ("fault", own)
    (found,) = derive([start, lost], [peer])
    assert found.kind == "lost"


NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:2363, "
WATCHDOG = "[PG ID 0 PG GUID 0(default_pg) Rank 3] Process group watchdog thread terminated with exception: "
TIMEOUT = (
    "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4, OpType=BROADCAST, "
    "NumelIn=112, NumelOut=112, Timeout(ms)=1800000) ran for 1800011 milliseconds before timing out."
)
REMOTE = (
    "remote process exited or there was a network error, NCCL version 2.21.5\nncclRemoteError: A call failed "
    "possibly due to a network error or a remote process exiting prematurely.\nLast error:\n"
    "socketProgress: Connection closed by remote peer ip-172-31-36-217.eu-north-1.compute.internal<59116>"
)
SYSTEM = (
    "unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.18.6\nncclSystemError: "
    "System call (e.g. socket, malloc) or external library call failed or device error. \nLast error:\n"
)
CUDA = (
    "unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.23.4\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 1 'invalid argument'"
)
USAGE = (
    "invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.21.5\nncclInvalidUsage: This "
    "usually reflects invalid usage of NCCL library.\nLast error:\nDuplicate GPU detected : rank 0 and rank "
    "1 both on CUDA device 1c000"
)
ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously"


@pytest.mark.parametrize(
    ("name", "message", "expected"),
    [
        ("RuntimeError", "[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1", True),
        ("DistBackendError", "NCCL error: " + REMOTE, True),
        ("DistBackendError", WATCHDOG + "NCCL error: " + REMOTE, True),
        ("DistBackendError", WATCHDOG + TIMEOUT, True),
        ("RuntimeError", "[Rank 2] NCCL watchdog thread terminated with exception: " + TIMEOUT, True),
        ("RuntimeError", "NCCL communicator was aborted on rank 3. Original reason: " + TIMEOUT, True),
        (
            "DistBackendError",
            NCCL + SYSTEM + "socketStartConnect: Connect to 192.168.19.14<52822> failed : No route to host",
            True,
        ),
        (
            "DistBackendError",
            NCCL + "internal error, NCCL version 2.14.3\nncclInternalError: Internal check "
            "failed.\nLast error:\nNet : Call to recv from 10.58.226.18<38309> failed : Connection refused",
            True,
        ),
        (
            "DistBackendError",
            NCCL + SYSTEM + "Error while creating shared memory segment /dev/shm/nccl-BUbmpc (size 9637888)",
            False,
        ),
        ("DistBackendError", NCCL + CUDA, False),
        ("DistBackendError", NCCL + USAGE, False),
        ("DistBackendError", WATCHDOG + ILLEGAL, False),
        ("RuntimeError", ILLEGAL, False),
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB.", False),
        ("DistStoreError", "Timed out after 31 seconds waiting for clients. 1/2 clients joined.", True),
        ("ValueError", "bad", False),
    ],
)
def test_faults_peer_loss_texts_recognized(name: str, message: str, expected: bool) -> None:
    """The texts are those that users have reported to PyTorch, Megatron, vLLM and NCCL."""
    assert is_peer_loss(name, message) is expected


def test_ledger_torn_line_left_out_next_whole(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 1)
    for event in ("progress", "start"):
        with ledger.path.open("ab") as file:
            file.write(b'{"event": "torn", "att')
        ledger.write(event, step=1)
    assert [event["event"] for event in read_events(tmp_path)] == ["progress", "start"]


def test_run_history_reads_again_only_when_forgotten(tmp_path: Path) -> None:
    def numbers() -> list[int]:
        return [attempt.number for attempt in history.attempts()]

    one, two = Ledger(tmp_path, 1), Ledger(tmp_path, 2)
    history = RunHistory(tmp_path)
    one.write("start")
    history.append(one.encode("start"))  # the first read finds it
    assert [event["event"] for event in history.events()] == ["start"]
    two.write("start")
    assert numbers() == [1], "others' events after the first read are not looked for"
    history.append(two.encode("start"))
    history.append('{"event": "torn", "att')
    assert numbers() == [1, 2]
    history.forget()
    Ledger(tmp_path, 3).write("start")
    assert numbers() == [1, 2, 3]


def test_interval_known_cases_match() -> None:
    assert young(2.0, 3600.0) == pytest.approx(120.0)
    assert daly(2.0, 3600.0) == pytest.approx(118.67, abs=0.01)
    assert daly(10.0, 4.0) == 4.0
    assert rate_bounds(0) == pytest.approx((0.0, 3.689), abs=1e-3)
    assert rate_bounds(5) == pytest.approx((1.623, 11.668), abs=1e-3)


def test_book_unwritable_ledger_warns_and_continues(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    run.mkdir()
    alone = SimpleNamespace(control=ControlGroup(None), rank=0, device=torch.device("cpu"))
    job = load_job(None, ["--data.text=x", f"--run.dir={run}"]).job
    book = AttemptRecorder()
    record, world = RunRecord("abc", "abc", 1.0, attempt=1), cast(DistributedContext, alone)
    book.open(job, record, world, {"num_ranks": 1}, RunHistory(run))
    assert [event["event"] for event in read_events(run)] == ["start"]
    shutil.rmtree(run)
    book.resumed(step=0, skipped=0, source="fresh start", lost_steps=0, load_s=0.0)
    book.end(status=0, reason="finished", step=1, error=None)
    assert caplog.text.count("record of this attempt is not complete") == 1
