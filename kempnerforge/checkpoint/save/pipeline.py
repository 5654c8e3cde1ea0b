"""One save on the background thread of each rank: write, report and, on the first rank, commit.

The thread enters no collective. Ranks exchange messages over a ``StoreChannel``.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from kempnerforge.checkpoint import cuda
from kempnerforge.checkpoint.format.checksums import FileRecord
from kempnerforge.checkpoint.format.manifest import Provenance
from kempnerforge.checkpoint.save import host_memory
from kempnerforge.checkpoint.save.commit import (
    CheckpointPayload,
    ExpectedFiles,
    FileReport,
    PlannedFile,
    commit,
    make_temporary,
)
from kempnerforge.checkpoint.save.frozen import FileSource, FrozenFiles, FrozenSave
from kempnerforge.checkpoint.save.host_buffers import HostBuffer, HostBuffers, needed_bytes
from kempnerforge.checkpoint.save.staging import BlockingCopy, Staging
from kempnerforge.checkpoint.save.writer_client import Writer, Written, with_backoff
from kempnerforge.checkpoint.save.writer_process import FileIdentity
from kempnerforge.distributed.store_channel import StoreChannel, collect
from kempnerforge.errors import HostMemoryError, SaveFailedError

T = TypeVar("T")

CHECK_EVERY_S = 1.0
"""How often, in seconds, a rank that writes checks whether the save has failed on another rank."""
STOP_TIMEOUT_S = 120.0
"""Seconds within which a rank stops writing for a save that has failed on another rank."""


class SaveCancelledError(SaveFailedError):
    """This rank stopped writing because the save had failed already."""


@dataclass(frozen=True)
class SaveRequest:
    """What a save records besides its tensors, and what it calls on the first rank's background thread."""

    provenance: Provenance = field(default_factory=Provenance)
    config_toml: str = ""
    before_write: Callable[[], str] = str
    """Called before anything is written. Returns why to skip the save, or an empty text."""
    before_commit: Callable[[], None] = lambda: None
    """Called before the rename. Raises to forbid the commit."""
    after_commit: Callable[[], None] = lambda: None
    """Called when the outcome has been posted for all ranks. Must neither raise nor block."""


@dataclass(frozen=True)
class SaveResult:
    """The outcome of a save, the same on all ranks."""

    error: str = ""
    """Why the save failed, with the rank and the cause; empty if it was committed."""
    write_s: float = 0.0
    """The slowest rank's seconds of writing, digesting and syncing, during and after the copy."""
    commit_s: float = 0.0
    """Seconds from the last rank's report to the commit."""
    total_s: float = 0.0
    """Seconds from the call to the commit."""
    size_bytes: int = 0
    """Bytes of the whole checkpoint."""
    linked_bytes: int = 0
    """Bytes of files that are links to those of an earlier step, and were not written."""
    warnings: list[str] = field(default_factory=list)
    """Problems that did not fail the save."""
    skipped: str = ""
    """Why the save was skipped for lack of space; empty if it was not."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often a write is tried, and when a save fails."""

    write_tries: int = 3
    first_pause_s: float = 1.0
    """Seconds before the second try of a write. The pause doubles with each try."""
    save_timeout_s: float | None = None
    """A save that has not ended after this many seconds fails. None: use ``automatic_timeout_s``."""


FIRST_RATE = 20e6
"""Bytes per second assumed for the first save."""
SHORTEST_TIMEOUT_S = 600.0
TIMES_EXPECTED = 10.0


def automatic_timeout_s(size_bytes: int, rates: Sequence[float]) -> float:
    """Return the seconds after which a save fails.

    ``size_bytes``: bytes of the rank that writes most. ``rates``: bytes per second of that rank in
    earlier saves, from the call to the commit. The slowest counts.
    """
    expected_s = size_bytes / min(rates, default=FIRST_RATE)
    return max(SHORTEST_TIMEOUT_S, TIMES_EXPECTED * expected_s)


@dataclass(eq=False)
class RankProgress:
    """Progress of a rank's part of a save. Its thread writes, any thread may read."""

    doing: str = "copy"
    """``copy``, ``write``, on the first rank ``commit``, then ``done``."""
    result: SaveResult | None = None
    """The outcome, once it is known. On the first rank only."""


@dataclass(frozen=True)
class SaveJob:
    """All that one rank needs for one save."""

    number: int
    rank: int
    num_ranks: int
    final: Path
    temporary: Path
    request: SaveRequest
    objects: Mapping[str, Any]
    """This rank's non-tensor leaves, as JSON."""
    staging: Staging
    buffers: HostBuffers
    largest_bytes: int
    """Size of the host buffers of the rank that writes most."""
    expected: ExpectedFiles | None
    """The files that all ranks write. Set only on the first rank, which commits."""
    contributed: Mapping[str, Any]
    """Non-tensor leaves, as JSON, that the first rank lacks."""
    retry: RetryPolicy
    timeout_s: float
    """Seconds after ``started`` at which the save fails."""
    failed_before: FailedSave | None
    """On the first rank: the previous save, if it failed and other ranks may still write its files."""
    started: float
    frozen_files: FrozenFiles
    frozen: FrozenSave
    """What this save does about the files of ``frozen_files``."""
    device: torch.device | None = None
    """The CUDA device that ``staging`` copies from; None if there is none."""
    progress: RankProgress = field(default_factory=RankProgress)

    def remember_frozen(self, committed: bool) -> None:
        """Let later saves link what this one has. Call it once all ranks know the outcome."""
        self.frozen_files.ended(self.frozen, self.final, committed=committed)


def result_key(number: int) -> str:
    """Key of the outcome of a save."""
    return f"{number}/result"


def _failure_key(number: int) -> str:
    """Key of the message that makes all ranks stop writing, because a rank or the save has failed."""
    return f"{number}/failed"


def _folder_key(number: int) -> str:
    """Key of the first rank's message that the folder exists, or that the save is skipped."""
    return f"{number}/folder"


def _report_keys(number: int, num_ranks: int) -> list[str]:
    return [f"{number}/rank{rank}" for rank in range(num_ranks)]


@dataclass(frozen=True)
class FailedSave:
    """A save that ended at its first failure, when other ranks may still have been writing."""

    number: int
    num_ranks: int
    name: str
    temporary: Path

    @classmethod
    def of(cls, job: SaveJob) -> FailedSave:
        """Return what must be remembered of ``job``."""
        return cls(job.number, job.num_ranks, job.final.name, job.temporary)

    def remove(self, channel: StoreChannel) -> None:
        """Wait until no rank writes its files, then delete them. First rank only, on the background thread.

        Raises SaveFailedError when a rank has not stopped in time.
        """
        keys = _report_keys(self.number, self.num_ranks)
        reports = collect(channel, keys, timeout_s=STOP_TIMEOUT_S)
        missing = [rank for rank, report in enumerate(reports.values()) if report is None]
        if missing:
            raise SaveFailedError(
                f"rank {missing[0]} still writes {self.name}, which failed, after {STOP_TIMEOUT_S:.0f} s"
            )
        shutil.rmtree(self.temporary, ignore_errors=True)


class RankSave:
    """One rank's part of one save. Everything but ``start`` runs on its background thread."""

    def __init__(self, job: SaveJob, writer: Writer, channel: StoreChannel) -> None:
        self.job = job
        self.writer = writer
        self.channel = channel
        self.thread: threading.Thread | None = None
        self._checked_at = 0.0

    def start(self) -> None:
        """Start the thread. If that fails, report the failure to the other ranks.

        The thread is not a daemon: Python joins it at exit, so that a save at the end of a script
        is not lost. It ends within the time that ``job.retry`` and the writer's time-out allow.
        """
        thread = threading.Thread(target=self._run, name=f"checkpoint-save-{self.job.number}", daemon=False)
        try:
            thread.start()
        except RuntimeError as error:
            self._report({"error": f"cannot start a thread: {error}"})
        else:
            self.thread = thread

    def _run(self) -> None:
        try:
            cuda.use(self.job.device)
            skipped = self._make_folder()
            message: dict[str, Any] = {"skipped": skipped} if skipped else self._write()
            self.job.staging.finish()
        except SaveCancelledError as error:
            message = {"error": str(error), "cancelled": True}
        except BaseException as error:  # noqa: BLE001 - whatever it is, the first rank must learn of it
            message = {"error": str(error) or type(error).__name__}
        try:
            self._report(message)
        finally:
            # After the report, because a device that hangs must not hide the failure from the other ranks.
            self.job.staging.wait_until_idle()
            if "files" in message and self.job.frozen.may_link:
                self.job.buffers.release_frozen()  # later saves link these files

    def _make_folder(self) -> str:
        """Make the folder of the save on the first rank; wait for it on others. Return why it is skipped.

        The ranks do not wait for these file operations when they agree on the save, because this
        runs on the background thread.
        """
        job, key = self.job, _folder_key(self.job.number)
        if job.rank != 0:
            stop_key = _failure_key(job.number)
            message = collect(self.channel, [key], timeout_s=job.timeout_s, stop_key=stop_key)[key]
            if message is None:
                self._require_needed()
                raise SaveFailedError(f"the first rank has made no folder after {job.timeout_s:.0f} s")
            return message["skipped"]
        if job.failed_before is not None:
            job.failed_before.remove(self.channel)
        skipped = job.request.before_write()
        if not skipped:
            try:
                make_temporary(job.final, job.temporary)
            except OSError as error:
                raise SaveFailedError(f"{type(error).__name__}: {error}") from error
        self.channel.post(key, {"skipped": skipped})
        return skipped

    def _require_needed(self) -> None:
        """Raise SaveFailedError when the save has taken too long or has failed on another rank."""
        if time.perf_counter() - self.job.started > self.job.timeout_s:
            raise SaveFailedError(f"not written after {self.job.timeout_s:.0f} s (checkpoint.save_timeout_s)")
        if self.channel.read(_failure_key(self.job.number)) is not None:
            raise SaveCancelledError("stopped writing because another rank failed")

    def _check(self) -> None:
        """Call ``_require_needed`` every ``CHECK_EVERY_S`` seconds."""
        now = time.monotonic()
        if now - self._checked_at >= CHECK_EVERY_S:
            self._checked_at = now
            self._require_needed()

    def _write(self) -> dict[str, Any]:
        """Write all files of this rank. Return the report for the first rank."""
        files: dict[str, Any] = {}
        write_s = 0.0
        self._checked_at = time.monotonic()
        frozen = self.job.frozen

        def add(file: PlannedFile, written: Written, header_digest: str) -> None:
            nonlocal write_s
            record = written.record
            files[file.name] = [record.size_bytes, record.xxh3_128, header_digest]
            write_s += written.write_s
            if file.frozen:
                path = self.job.final / file.name
                frozen.done[file.name] = FileSource(path, record, header_digest, written.identity)

        for number, buffer in enumerate(self.job.buffers.buffers):
            staged = partial(self._staged_bytes, number)
            written = self._link_if_equal(buffer, staged) or self._write_file(buffer, staged)
            add(buffer.file, written, buffer.header_digest)
        for file, source in frozen.links:
            written = self._link(file.name, source.path, source.record, source.identity)
            add(file, written or self._write_from_memory(file), source.header_digest)
        return {
            "files": files,
            "write_s": write_s,
            "objects": dict(self.job.contributed),
            "linked_bytes": frozen.linked_bytes,
            "warnings": frozen.warnings,
        }

    def _retry(self, work: Callable[[], T]) -> T:
        def checked() -> T:
            self._check()
            return work()

        retry = self.job.retry
        return with_backoff(checked, tries=retry.write_tries, first_pause_s=retry.first_pause_s)

    def _write_file(self, buffer: HostBuffer, staged: Callable[[], int] | None) -> Written:
        path = self.job.temporary / buffer.file.name
        keep = not buffer.file.frozen or not self.job.frozen.may_link
        size_bytes, check = buffer.image.size_bytes, self._check
        return self._retry(
            lambda: self.writer.write(buffer.fd, path, size_bytes, staged=staged, check=check, keep=keep)
        )

    def _link_if_equal(self, buffer: HostBuffer, staged: Callable[[], int]) -> Written | None:
        """Link a staged file of frozen tensors to a file of an earlier step that has the same digests."""
        name, size_bytes, check = buffer.file.name, buffer.image.size_bytes, self._check
        stored = self.job.frozen.same_size(size_bytes) if buffer.file.frozen else {}
        if not stored:
            return None
        path = self.job.temporary / name
        digested = self._retry(
            lambda: self.writer.digest(buffer.fd, path, size_bytes, staged=staged, check=check)
        )
        source = next((path for path, record in stored.items() if record == digested.record), None)
        return self._link(name, source, digested.record, None) if source is not None else None

    def _link(
        self, name: str, source: Path, record: FileRecord, identity: FileIdentity | None
    ) -> Written | None:
        """Link ``source`` into the step. Return None if that failed, so that the file has to be written."""
        path, size_bytes = self.job.temporary / name, record.size_bytes
        linked = self._retry(lambda: self.writer.link(source, path, size_bytes, identity, check=self._check))
        if linked.refused:
            is_own = identity is not None
            self.job.frozen.link_failed(name, linked.errno, linked.refused, is_own=is_own)
            return None
        self.job.frozen.linked_bytes += size_bytes
        return Written(record, 0.0, linked.identity)

    def _write_from_memory(self, file: PlannedFile) -> Written:
        """Stage and write a file of frozen tensors that has no host buffer, because a link of it failed."""
        job = self.job
        if (fault := host_memory.fault([host_memory.claim(needed_bytes([file]))], None)) is not None:
            raise HostMemoryError(fault)
        buffers = HostBuffers([file], None)
        try:
            copy = BlockingCopy(buffers.pairs(job.frozen.tensors))
            copy.start()
            copy.finish()
            if not job.frozen_files.is_unchanged(file, job.frozen.tensors):
                raise SaveFailedError(
                    f"tensors of {file.name} require no gradient and changed during the save"
                )
            return self._write_file(buffers.buffers[0], None)
        finally:
            buffers.close()

    def _staged_bytes(self, number: int) -> int:
        """Return how many bytes of a buffer are staged. Raises SaveFailedError if the copy failed."""
        job = self.job
        try:
            size_bytes = job.buffers.staged_bytes(number, job.staging.copied())
        except BaseException as error:  # also the Ctrl-C that ended the copy
            raise SaveFailedError(
                f"copying to host memory failed: {type(error).__name__}: {error}"
            ) from error
        if size_bytes == job.buffers.buffers[number].image.size_bytes:
            job.progress.doing = "write"
        return size_bytes

    def _report(self, message: dict[str, Any]) -> None:
        """Post what this rank has done. The first rank then ends the save."""
        job, channel = self.job, self.channel
        channel.post(_report_keys(job.number, job.num_ranks)[job.rank], message)
        if "error" in message:
            channel.post(_failure_key(job.number), {"rank": job.rank})
        if job.rank == 0:
            job.progress.doing = "commit"
            self._end_save()
            # All ranks have ended the previous save: this one has begun since.
            channel.forget(_failure_key(job.number - 1))
            channel.forget(_folder_key(job.number - 1))
        channel.forget(_report_keys(job.number - 1, job.num_ranks)[job.rank])
        job.progress.doing = "done"

    def _end_save(self) -> None:
        """Collect the reports of all ranks, commit, and post the outcome. First rank only."""
        job, channel = self.job, self.channel
        keys, failure = _report_keys(job.number, job.num_ranks), _failure_key(job.number)
        left_s = max(0.0, job.timeout_s - (time.perf_counter() - job.started))
        reports = collect(channel, keys, timeout_s=left_s, stop_key=failure)
        try:
            result = _commit(job, [reports[key] for key in keys])
        except Exception as error:  # noqa: BLE001 - the outcome is posted for all ranks
            result = SaveResult(error=f"rank 0: {type(error).__name__}: {error}")
        if result.error:
            channel.post(failure, {"rank": 0})  # ranks that still write for it stop
        job.progress.result = result
        channel.post(result_key(job.number), asdict(result))
        if result.error:
            shutil.rmtree(job.temporary, ignore_errors=True)
        elif not result.skipped:
            job.request.after_commit()  # after posting: nothing may delay the outcome of a commit
        # Every rank has read the outcome of the save before the last one, because it has begun another since.
        channel.forget(result_key(job.number - 2))


def _commit(job: SaveJob, reports: Sequence[Mapping[str, Any] | None]) -> SaveResult:
    assert job.expected is not None
    collected = time.perf_counter()
    failed = [(rank, report) for rank, report in enumerate(reports) if report and "error" in report]
    if failed:  # name the cause, not a rank that stopped because of it
        rank, report = min(failed, key=lambda failure: "cancelled" in failure[1])
        return SaveResult(error=f"rank {rank}: {report['error']}")
    complete = [report for report in reports if report is not None]
    if complete and (skipped := complete[0].get("skipped")):
        return SaveResult(skipped=skipped)
    if len(complete) < len(reports):
        rank = next(rank for rank, report in enumerate(reports) if report is None)
        return SaveResult(error=f"rank {rank} has not reported after {job.timeout_s:.0f} s")
    objects = dict(job.objects)
    for report in complete:
        objects |= {name: value for name, value in report["objects"].items() if name not in objects}
    files = {
        name: FileReport(FileRecord(size_bytes, tuple(digests)), header_digest)
        for report in complete
        for name, (size_bytes, digests, header_digest) in report["files"].items()
    }
    request = job.request
    size_bytes = commit(
        job.temporary,
        job.final,
        expected=job.expected,
        reports=files,
        contents=CheckpointPayload(request.provenance, objects, request.config_toml),
        before_publish=request.before_commit,
    )
    ended = time.perf_counter()
    return SaveResult(
        write_s=max(report["write_s"] for report in complete),
        commit_s=ended - collected,
        total_s=ended - job.started,
        size_bytes=size_bytes,
        linked_bytes=sum(report["linked_bytes"] for report in complete),
        warnings=[
            f"rank {rank}: {warning}"
            for rank, report in enumerate(complete)
            for warning in report["warnings"]
        ],
    )
