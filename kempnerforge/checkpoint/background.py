"""What goes on behind the loop for one save: write, report, on the first rank commit. No collectives."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from kempnerforge.checkpoint.arena import ArenaSet
from kempnerforge.checkpoint.board import Board, collect
from kempnerforge.checkpoint.commit import Contents, Expected, FileReport, commit
from kempnerforge.checkpoint.digest import FileRecord
from kempnerforge.checkpoint.staging import Staging
from kempnerforge.checkpoint.writer import Writer, Written, with_backoff
from kempnerforge.errors import SaveFailedError


@dataclass(frozen=True)
class SaveResult:
    """What came of one save: the same on all ranks."""

    error: str = ""
    """Why it failed, with the rank and the cause; empty when it is committed."""
    write_s: float = 0.0
    """The slowest rank's time for writing, digesting and syncing, while and after it was copied."""
    commit_s: float = 0.0
    """From the last rank's report to the commit."""
    total_s: float = 0.0
    """From the call to the commit."""
    size_bytes: int = 0
    """Bytes of the whole checkpoint."""
    warnings: list[str] = field(default_factory=list)
    """What went wrong after the commit."""


@dataclass(frozen=True)
class Patience:
    """How long a save tries."""

    write_tries: int = 3
    first_pause_s: float = 1.0
    """Before the second try of a write; it doubles."""
    save_timeout_s: float = 1800.0
    """A rank that has not reported after so long fails the save."""


@dataclass(eq=False)
class Part:
    """How far a rank is with its part of a save: written by its thread, read by any."""

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
    before_commit: Callable[[], None]
    after_commit: Callable[[], list[str]]
    patience: Patience
    part: Part = field(default_factory=Part)
    started: float = field(default_factory=time.perf_counter)


def result_key(number: int) -> str:
    """Where the outcome of a save is posted."""
    return f"{number}/result"


def start(job: SaveJob, writer: Writer, board: Board) -> threading.Thread:
    """Do the job on a thread.

    Python waits for it before the interpreter exits: a save at the end of a script is not lost. It ends in
    bounded time, as ``job.patience`` and the writer's time-out say.
    """
    thread = threading.Thread(
        target=_work, args=(job, writer, board), name=f"checkpoint-save-{job.number}", daemon=False
    )
    thread.start()
    return thread


def _work(job: SaveJob, writer: Writer, board: Board) -> None:
    try:
        message: dict[str, Any] = _write(job, writer)
        job.staging.finish()
    except Exception as error:  # noqa: BLE001 - whatever it is, the first rank must learn of it
        message = {"error": str(error) or type(error).__name__}
    board.post(f"{job.number}/rank{job.rank}", message)
    if job.rank == 0:
        job.part.doing = "commit"
        _conclude(job, board)
    board.forget(f"{job.number - 1}/rank{job.rank}")  # it was read: this save has begun since
    job.part.doing = "done"


def _write(job: SaveJob, writer: Writer) -> dict[str, Any]:
    files, write_s = {}, 0.0
    for number, arena in enumerate(job.arenas.arenas):
        written = with_backoff(
            partial(_write_file, job, writer, number),
            tries=job.patience.write_tries,
            first_pause_s=job.patience.first_pause_s,
        )
        record = written.record
        files[arena.file.name] = [record.size_bytes, record.xxh3_128, arena.header_digest]
        write_s += written.write_s
    return {"files": files, "write_s": write_s}


def _write_file(job: SaveJob, writer: Writer, number: int) -> Written:
    arena = job.arenas.arenas[number]
    path, staged = job.temporary / arena.file.name, partial(_staged_bytes, job, number)
    return writer.write(arena.fd, path, arena.image.size_bytes, staged=staged)


def _staged_bytes(job: SaveJob, number: int) -> int:
    """How much of an arena is there to be written. Raises SaveFailedError for what the copy raised."""
    try:
        size_bytes = job.arenas.staged_bytes(number, job.staging.copied())
    except Exception as error:
        raise SaveFailedError(f"copying to host memory failed: {type(error).__name__}: {error}") from error
    if size_bytes == job.arenas.arenas[number].image.size_bytes:
        job.part.doing = "write"
    return size_bytes


def _conclude(job: SaveJob, board: Board) -> None:
    keys = [f"{job.number}/rank{rank}" for rank in range(job.num_ranks)]
    reports = collect(board, keys, timeout_s=job.patience.save_timeout_s)
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
    sound = []
    for rank, report in enumerate(reports):
        if report is None:
            return SaveResult(error=f"rank {rank} has not reported after {job.patience.save_timeout_s:.0f} s")
        if "error" in report:
            return SaveResult(error=f"rank {rank}: {report['error']}")
        sound.append(report)
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
        contents=job.contents,
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
