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
from kempnerforge.checkpoint.arena import ArenaSet
from kempnerforge.checkpoint.board import Board, collect
from kempnerforge.checkpoint.commit import Contents, Expected, FileReport, commit
from kempnerforge.checkpoint.digest import FileRecord
from kempnerforge.checkpoint.staging import Staging
from kempnerforge.checkpoint.writer import Writer, Written, with_backoff
from kempnerforge.errors import SaveFailedError


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
    """What went wrong after the commit."""


@dataclass(frozen=True)
class Patience:
    """When a save gives up."""

    write_tries: int = 3
    first_pause_s: float = 1.0
    """Before the second try of a write; it doubles."""
    save_timeout_s: float = 1800.0
    """A rank that has not reported after this many seconds fails the save."""


@dataclass(eq=False)
class Part:
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
    contents: Contents
    staging: Staging
    arenas: ArenaSet
    expected: Expected | None
    """What all ranks write; on the first rank only, which commits."""
    contributed: Mapping[str, Any]
    """Non-tensor leaves, as JSON, that the first rank lacks."""
    before_commit: Callable[[], None]
    after_commit: Callable[[], list[str]]
    patience: Patience
    device: torch.device | None = None
    """The CUDA device that ``staging`` copies from; None if there is none."""
    part: Part = field(default_factory=Part)
    started: float = field(default_factory=time.perf_counter)


def result_key(number: int) -> str:
    """Key of the outcome of a save."""
    return f"{number}/result"


def _failure_key(number: int) -> str:
    """Key that any rank posts when it fails, so that the first rank need not wait for the others."""
    return f"{number}/failed"


def _report_keys(number: int, num_ranks: int) -> list[str]:
    return [f"{number}/rank{rank}" for rank in range(num_ranks)]


def start(job: SaveJob, writer: Writer, board: Board) -> threading.Thread | None:
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


def _work(job: SaveJob, writer: Writer, board: Board) -> None:
    try:
        cuda.use(job.device)
        message: dict[str, Any] = _write(job, writer)
        job.staging.finish()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the first rank must learn of it
        message = {"error": str(error) or type(error).__name__}
    try:
        _report(job, board, message)
    finally:
        job.staging.settle()  # not before: a device that hangs must not keep the failure from the others


def _report(job: SaveJob, board: Board, message: dict[str, Any]) -> None:
    """Post what this rank has done; the first rank then concludes the save."""
    board.post(_report_keys(job.number, job.num_ranks)[job.rank], message)
    if "error" in message:
        board.post(_failure_key(job.number), {"rank": job.rank})
    if job.rank == 0:
        job.part.doing = "commit"
        _conclude(job, board)
        board.forget(_failure_key(job.number - 1))  # all ranks have ended that save: this one has begun since
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

    def settle(self, board: Board, *, timeout_s: float) -> None:
        """Wait until no rank writes any more, then remove what they wrote. First rank only.

        Raises SaveFailedError when a rank has not ended in time.
        """
        reports = collect(board, _report_keys(self.number, self.num_ranks), timeout_s=timeout_s)
        missing = [rank for rank, report in enumerate(reports.values()) if report is None]
        if missing:
            raise SaveFailedError(
                f"rank {missing[0]} still writes {self.name}, which has failed, after {timeout_s:.0f} s"
            )
        shutil.rmtree(self.temporary, ignore_errors=True)


def _write(job: SaveJob, writer: Writer) -> dict[str, Any]:
    files: dict[str, Any] = {}
    write_s = 0.0
    for number, arena in enumerate(job.arenas.arenas):
        written = with_backoff(
            partial(_write_file, job, writer, number),
            tries=job.patience.write_tries,
            first_pause_s=job.patience.first_pause_s,
        )
        record = written.record
        files[arena.file.name] = [record.size_bytes, record.xxh3_128, arena.header_digest]
        write_s += written.write_s
    return {"files": files, "write_s": write_s, "objects": dict(job.contributed)}


def _write_file(job: SaveJob, writer: Writer, number: int) -> Written:
    arena = job.arenas.arenas[number]
    path, staged = job.temporary / arena.file.name, partial(_staged_bytes, job, number)
    return writer.write(arena.fd, path, arena.image.size_bytes, staged=staged)


def _staged_bytes(job: SaveJob, number: int) -> int:
    """Return how many bytes of an arena are staged. Raises SaveFailedError if the copy failed."""
    try:
        size_bytes = job.arenas.staged_bytes(number, job.staging.copied())
    except BaseException as error:  # also the Ctrl-C that ended the copy
        raise SaveFailedError(f"copying to host memory failed: {type(error).__name__}: {error}") from error
    if size_bytes == job.arenas.arenas[number].image.size_bytes:
        job.part.doing = "write"
    return size_bytes


def _conclude(job: SaveJob, board: Board) -> None:
    keys = _report_keys(job.number, job.num_ranks)
    reports = collect(board, keys, timeout_s=job.patience.save_timeout_s, stop_key=_failure_key(job.number))
    try:
        result = _commit(job, [reports[key] for key in keys])
    except Exception as error:  # noqa: BLE001 - the outcome goes to all ranks over the board
        result = SaveResult(error=f"rank 0: {type(error).__name__}: {error}")
    if result.error:
        shutil.rmtree(job.temporary, ignore_errors=True)
    job.part.result = result
    board.post(result_key(job.number), asdict(result))
    # Every rank has read the outcome before last: it has begun a save since.
    board.forget(result_key(job.number - 2))


def _commit(job: SaveJob, reports: Sequence[Mapping[str, Any] | None]) -> SaveResult:
    assert job.expected is not None
    collected = time.perf_counter()
    for rank, report in enumerate(reports):
        if report is not None and "error" in report:
            return SaveResult(error=f"rank {rank}: {report['error']}")
    sound = [report for report in reports if report is not None]
    if len(sound) < len(reports):
        rank = next(rank for rank, report in enumerate(reports) if report is None)
        return SaveResult(error=f"rank {rank} has not reported after {job.patience.save_timeout_s:.0f} s")
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
        warnings=job.after_commit(),
    )
