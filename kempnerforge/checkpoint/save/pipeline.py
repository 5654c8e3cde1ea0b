"""One save in the background: write, report and, on the first rank, commit. No collectives."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kempnerforge.checkpoint import cuda
from kempnerforge.checkpoint.format.checksums import FileRecord
from kempnerforge.checkpoint.save.commit import (
    CheckpointPayload,
    ExpectedFiles,
    FileReport,
    commit,
    make_temporary,
)
from kempnerforge.checkpoint.save.host_buffers import HostBuffers
from kempnerforge.checkpoint.save.staging import Staging
from kempnerforge.checkpoint.save.writer_client import Writer, Written, with_backoff
from kempnerforge.distributed.store_channel import StoreChannel, collect
from kempnerforge.errors import SaveFailedError

LOOK_EVERY_S = 1.0
"""A rank that writes looks so often whether the save has failed elsewhere."""
SETTLE_TIMEOUT_S = 120.0
"""A rank whose save has failed elsewhere ends its part within this."""


class SaveCancelledError(SaveFailedError):
    """This rank stopped writing because the save had failed already."""


@dataclass(frozen=True)
class SaveResult:
    """The outcome of a save, the same on all ranks."""

    error: str = ""
    """Why it failed, with the rank and the cause; empty when it is committed."""
    write_s: float = 0.0
    """The slowest rank's seconds of writing, digesting and syncing, during and after the copy."""
    commit_s: float = 0.0
    """Seconds from the last rank's report to the commit."""
    total_s: float = 0.0
    """Seconds from the call to the commit."""
    size_bytes: int = 0
    """Bytes of the whole checkpoint."""
    warnings: list[str] = field(default_factory=list)
    """What went wrong and did not fail the save."""
    skipped: str = ""
    """Why it was left out for lack of space; empty when it was not."""


@dataclass(frozen=True)
class RetryPolicy:
    """When a save gives up."""

    write_tries: int = 3
    first_pause_s: float = 1.0
    """Before the second try of a write; it doubles."""
    save_timeout_s: float | None = None
    """A save that has not ended after this many seconds fails; None: as ``automatic_timeout_s`` says."""


FIRST_RATE = 20e6
"""Bytes per second that the first save is expected to be written with."""
SHORTEST_TIMEOUT_S = 600.0
TIMES_EXPECTED = 10.0


def automatic_timeout_s(size_bytes: int, rates: Sequence[float]) -> float:
    """Return after how many seconds a save is given up.

    ``size_bytes``: what the rank that writes most writes. ``rates``: bytes per second of that rank in earlier
    saves, from the call to the commit. The slowest counts.
    """
    expected_s = size_bytes / min(rates, default=FIRST_RATE)
    return max(SHORTEST_TIMEOUT_S, TIMES_EXPECTED * expected_s)


@dataclass(eq=False)
class RankProgress:
    """Progress of a rank's part of a save. Its thread writes, any thread may read."""

    doing: str = "copy"
    """``copy``, ``write``, on the first rank ``commit``, then ``done``."""
    result: SaveResult | None = None
    """The outcome, once it is known; on the first rank only."""


@dataclass(frozen=True)
class SaveJob:
    """One save under way, on one rank."""

    number: int
    rank: int
    num_ranks: int
    final: Path
    temporary: Path
    contents: CheckpointPayload
    staging: Staging
    arenas: HostBuffers
    expected: ExpectedFiles | None
    """What all ranks write; on the first rank only, which commits."""
    contributed: Mapping[str, Any]
    """Non-tensor leaves, as JSON, that the first rank lacks."""
    before_write: Callable[[], str]
    before_commit: Callable[[], None]
    after_commit: Callable[[], None]
    patience: RetryPolicy
    timeout_s: float
    """From ``started`` until the save is given up."""
    failed_before: FailedSave | None
    """On the first rank: the save before, if it failed and other ranks may still write its files."""
    started: float
    device: torch.device | None = None
    """The CUDA device that ``staging`` copies from; None if there is none."""
    part: RankProgress = field(default_factory=RankProgress)


def result_key(number: int) -> str:
    """Key of the outcome of a save."""
    return f"{number}/result"


def _failure_key(number: int) -> str:
    """Key that is posted when a rank fails or the save is given up: nobody writes on for it."""
    return f"{number}/failed"


def _folder_key(number: int) -> str:
    """Key that the first rank posts when the folder to write to is there, or when the save is left out."""
    return f"{number}/folder"


def _report_keys(number: int, num_ranks: int) -> list[str]:
    return [f"{number}/rank{rank}" for rank in range(num_ranks)]


def start(job: SaveJob, writer: Writer, board: StoreChannel) -> threading.Thread | None:
    """Run the job on a new thread. If none can be started, report the failure and return None.

    The thread is not a daemon: Python joins it at exit, so that a save at the end of a script is not lost. It
    ends within the time that ``job.patience`` and the writer's time-out allow.
    """
    thread = threading.Thread(
        target=_work, args=(job, writer, board), name=f"checkpoint-save-{job.number}", daemon=False
    )
    try:
        thread.start()
    except RuntimeError as error:
        _report(job, board, {"error": f"cannot start a thread: {error}"})
        return None
    return thread


def _work(job: SaveJob, writer: Writer, board: StoreChannel) -> None:
    try:
        cuda.use(job.device)
        skipped = _begin(job, board)
        message: dict[str, Any] = {"skipped": skipped} if skipped else _write(job, writer, board)
        job.staging.finish()
    except SaveCancelledError as error:
        message = {"error": str(error), "cancelled": True}
    except BaseException as error:  # noqa: BLE001 - whatever it is, the first rank must learn of it
        message = {"error": str(error) or type(error).__name__}
    try:
        _report(job, board, message)
    finally:
        job.staging.settle()  # not before: a device that hangs must not keep the failure from the others


def _begin(job: SaveJob, board: StoreChannel) -> str:
    """Make the folder of the save, on the first rank; on others wait for it. Returns why it is left out.

    Here and not where the ranks agree: these are file operations, and every rank would wait for them.
    """
    key = _folder_key(job.number)
    if job.rank != 0:
        found = collect(board, [key], timeout_s=job.timeout_s, stop_key=_failure_key(job.number))[key]
        if found is None:
            _require_needed(job, board)
            raise SaveFailedError(f"the first rank has made no folder after {job.timeout_s:.0f} s")
        return found["skipped"]
    if job.failed_before is not None:
        job.failed_before.settle(board)
    skipped = job.before_write()
    if not skipped:
        try:
            make_temporary(job.final, job.temporary)
        except OSError as error:
            raise SaveFailedError(f"{type(error).__name__}: {error}") from error
    board.post(key, {"skipped": skipped})
    return skipped


def _require_needed(job: SaveJob, board: StoreChannel) -> None:
    """Raise SaveFailedError when the save has taken too long or has failed elsewhere."""
    if time.perf_counter() - job.started > job.timeout_s:
        raise SaveFailedError(f"not written after {job.timeout_s:.0f} s (checkpoint.save_timeout_s)")
    if board.read(_failure_key(job.number)) is not None:
        raise SaveCancelledError("stopped writing because another rank failed")


def _report(job: SaveJob, board: StoreChannel, message: dict[str, Any]) -> None:
    """Post what this rank has done; the first rank then concludes the save."""
    board.post(_report_keys(job.number, job.num_ranks)[job.rank], message)
    if "error" in message:
        board.post(_failure_key(job.number), {"rank": job.rank})
    if job.rank == 0:
        job.part.doing = "commit"
        _conclude(job, board)
        # All ranks have ended that save: this one has begun since.
        board.forget(_failure_key(job.number - 1))
        board.forget(_folder_key(job.number - 1))
    board.forget(_report_keys(job.number - 1, job.num_ranks)[job.rank])
    job.part.doing = "done"


@dataclass(frozen=True)
class FailedSave:
    """A save that was concluded at its first failure, when other ranks may still have been writing."""

    number: int
    num_ranks: int
    name: str
    temporary: Path

    @classmethod
    def of(cls, job: SaveJob) -> FailedSave:
        """Return what has to be remembered of ``job``."""
        return cls(job.number, job.num_ranks, job.final.name, job.temporary)

    def settle(self, board: StoreChannel) -> None:
        """Wait until no rank writes any more, then remove what they wrote. First rank only, in background.

        Raises SaveFailedError when a rank has not ended in time.
        """
        keys = _report_keys(self.number, self.num_ranks)
        reports = collect(board, keys, timeout_s=SETTLE_TIMEOUT_S)
        missing = [rank for rank, report in enumerate(reports.values()) if report is None]
        if missing:
            raise SaveFailedError(
                f"rank {missing[0]} still writes {self.name}, which failed, after {SETTLE_TIMEOUT_S:.0f} s"
            )
        shutil.rmtree(self.temporary, ignore_errors=True)


def _write(job: SaveJob, writer: Writer, board: StoreChannel) -> dict[str, Any]:
    files: dict[str, Any] = {}
    write_s = 0.0
    looked_at = time.monotonic()

    def check() -> None:
        """Look now and then whether the save is still needed."""
        nonlocal looked_at
        if (now := time.monotonic()) - looked_at >= LOOK_EVERY_S:
            looked_at = now
            _require_needed(job, board)

    for number, arena in enumerate(job.arenas.arenas):
        written = with_backoff(
            partial(_write_file, job, writer, number, check),
            tries=job.patience.write_tries,
            first_pause_s=job.patience.first_pause_s,
        )
        record = written.record
        files[arena.file.name] = [record.size_bytes, record.xxh3_128, arena.header_digest]
        write_s += written.write_s
    return {"files": files, "write_s": write_s, "objects": dict(job.contributed)}


def _write_file(job: SaveJob, writer: Writer, number: int, check: Callable[[], None]) -> Written:
    check()
    arena = job.arenas.arenas[number]
    path, staged = job.temporary / arena.file.name, partial(_staged_bytes, job, number)
    return writer.write(arena.fd, path, arena.image.size_bytes, staged=staged, check=check)


def _staged_bytes(job: SaveJob, number: int) -> int:
    """Return how many bytes of an arena are staged. Raises SaveFailedError if the copy failed."""
    try:
        size_bytes = job.arenas.staged_bytes(number, job.staging.copied())
    except BaseException as error:  # also the Ctrl-C that ended the copy
        raise SaveFailedError(f"copying to host memory failed: {type(error).__name__}: {error}") from error
    if size_bytes == job.arenas.arenas[number].image.size_bytes:
        job.part.doing = "write"
    return size_bytes


def _conclude(job: SaveJob, board: StoreChannel) -> None:
    keys, failure = _report_keys(job.number, job.num_ranks), _failure_key(job.number)
    left_s = max(0.0, job.timeout_s - (time.perf_counter() - job.started))
    reports = collect(board, keys, timeout_s=left_s, stop_key=failure)
    try:
        result = _commit(job, [reports[key] for key in keys])
    except Exception as error:  # noqa: BLE001 - the outcome goes to all ranks over the board
        result = SaveResult(error=f"rank 0: {type(error).__name__}: {error}")
    if result.error:
        board.post(failure, {"rank": 0})  # ranks that still write for it stop
    job.part.result = result
    board.post(result_key(job.number), asdict(result))
    if result.error:
        shutil.rmtree(job.temporary, ignore_errors=True)
    elif not result.skipped:
        job.after_commit()  # only now: nothing stands between a commit and its outcome
    # Every rank has read the outcome before last: it has begun a save since.
    board.forget(result_key(job.number - 2))


def _commit(job: SaveJob, reports: Sequence[Mapping[str, Any] | None]) -> SaveResult:
    assert job.expected is not None
    collected = time.perf_counter()
    failed = [(rank, report) for rank, report in enumerate(reports) if report and "error" in report]
    if failed:  # the cause, and not who ended because of it
        rank, report = min(failed, key=lambda one: "cancelled" in one[1])
        return SaveResult(error=f"rank {rank}: {report['error']}")
    sound = [report for report in reports if report is not None]
    if sound and (skipped := sound[0].get("skipped")):
        return SaveResult(skipped=skipped)
    if len(sound) < len(reports):
        rank = next(rank for rank, report in enumerate(reports) if report is None)
        return SaveResult(error=f"rank {rank} has not reported after {job.timeout_s:.0f} s")
    objects = dict(job.contents.objects)
    for report in sound:
        objects |= {name: value for name, value in report["objects"].items() if name not in objects}
    files = {
        name: FileReport(FileRecord(size_bytes, tuple(digests)), header_digest)
        for report in sound
        for name, (size_bytes, digests, header_digest) in report["files"].items()
    }
    size_bytes = commit(
        job.temporary,
        job.final,
        expected=job.expected,
        reports=files,
        contents=replace(job.contents, objects=objects),
        before_publish=job.before_commit,
    )
    ended = time.perf_counter()
    return SaveResult(
        write_s=max(report["write_s"] for report in sound),
        commit_s=ended - collected,
        total_s=ended - job.started,
        size_bytes=size_bytes,
    )
