"""Verify every byte of a step, and that its files agree with each other.

Needs no torch, changes nothing, and does not stop at the first fault.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kempnerforge.checkpoint.format import json_values, manifest, paths, safetensors_file
from kempnerforge.checkpoint.format.checksums import BLOCK_BYTES, VerifiedFile
from kempnerforge.checkpoint.format.manifest import Manifest
from kempnerforge.checkpoint.format.step_info import StepView
from kempnerforge.checkpoint.format.tensor_index import Chunk, TensorEntry
from kempnerforge.checkpoint.retention import read_locks
from kempnerforge.checkpoint.run.resumable_steps import check_counters
from kempnerforge.errors import (
    DamagedCheckpointError,
    NoTrainingStateError,
    StepNotFoundError,
    UnreachableCheckpointError,
)

MAX_THREADS = 8
_UNIT_BLOCKS = 8
"""Number of blocks in one task of a thread."""


@dataclass(frozen=True)
class Verified:
    """Result of verifying one step."""

    path: Path
    problems: tuple[str, ...]
    """All faults."""
    foreign: tuple[str, ...]
    """Files in its folder that are not in the manifest. They do no harm."""
    size_bytes: int
    """Number of verified bytes."""

    @property
    def sound(self) -> bool:
        """Whether there are no faults."""
        return not self.problems


def verify(
    path: Path, *, threads: int | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Verified:
    """Verify every byte of the step in ``path``. Retention does not delete it meanwhile.

    ``progress`` is called with the bytes done so far, and the total. Raises StepNotFoundError if
    the step does not exist or disappears, UnreachableCheckpointError if it cannot be read (it may
    be intact), MismatchError for another format version.
    """
    with read_locks.lock_for_reading(path, what="verify"):
        try:
            return _verify(path, threads or _default_threads(), progress)
        except OSError as error:
            if not path.is_dir():
                raise StepNotFoundError(f"{path} disappeared while it was read") from None
            raise UnreachableCheckpointError(f"{path} cannot be read: {error}. It may be intact") from error


def _verify(path: Path, threads: int, progress: Callable[[int, int], None]) -> Verified:
    try:
        found = _manifest_of(path)
    except DamagedCheckpointError as error:
        if not path.is_dir():
            raise StepNotFoundError(f"{path} disappeared while it was read") from None
        return Verified(path, (_without_name(error, path),), (), 0)
    known = {paths.MANIFEST, *found.files}
    unknown = sorted(entry.name for entry in path.iterdir() if entry.name not in known)
    problems = [
        f"{name} is not in the manifest, but tools that read all shards would read it"
        for name in unknown
        if name.endswith(paths.SHARD_SUFFIX)
    ]
    wrong = _wrong_blocks(path, found, threads, progress)
    problems += [problem for name in sorted(wrong) for problem in wrong[name]]
    problems += _disagreements(StepView(path, found), set(wrong))
    foreign = tuple(name for name in unknown if not name.endswith(paths.SHARD_SUFFIX))
    return Verified(path, tuple(problems), foreign, found.size_bytes)


def _manifest_of(path: Path) -> Manifest:
    """Return a step's manifest. A state dict saved without a run may also have the name of a step."""
    try:
        return manifest.load(path, step=paths.step_number(path.name))
    except NoTrainingStateError:
        return manifest.load(path)


def _wrong_blocks(
    path: Path, found: Manifest, threads: int, progress: Callable[[int, int], None]
) -> dict[str, list[str]]:
    """Return file -> faults in its bytes. Uses several threads."""
    units = [
        (name, first, min(first + _UNIT_BLOCKS, len(record.xxh3_128)))
        for name, record in sorted(found.files.items())
        for first in range(0, len(record.xxh3_128), _UNIT_BLOCKS)
    ]

    def check(unit: tuple[str, int, int]) -> tuple[str, list[str], int]:
        name, first, last = unit
        problems = []
        with VerifiedFile(path / name, found.files[name]) as file:
            for number in range(first, last):
                try:
                    file.block(number)
                except DamagedCheckpointError as error:
                    problems.append(_without_name(error, path))
        size_bytes = min(last * BLOCK_BYTES, found.files[name].size_bytes) - first * BLOCK_BYTES
        return name, problems, size_bytes

    wrong: dict[str, list[str]] = {}
    done, total = 0, found.size_bytes
    executor = ThreadPoolExecutor(threads)
    try:
        for name, problems, size_bytes in executor.map(check, units):
            done += size_bytes
            progress(done, total)
            if problems:
                wrong.setdefault(name, []).extend(problems)
    finally:
        # An interrupt must not wait for terabytes in the queue.
        executor.shutdown(cancel_futures=True)
    return wrong


def _disagreements(view: StepView, wrong: set[str]) -> Iterator[str]:
    """Yield the contradictions between files of a step, ignoring files with ``wrong`` bytes."""
    if paths.TRAIN_STATE not in wrong:
        yield from _train_state_problems(view)
    if paths.CONFIG not in wrong:
        yield from _problems_of(view, lambda: view.config())
    if paths.INDEX in wrong:
        return
    try:
        entries = view.tensors()
    except DamagedCheckpointError as error:
        yield _without_name(error, view.path)
        return
    shards = set(view.shards())
    expected = _chunks_by_file(entries)
    for name in sorted(expected.keys() - shards):
        yield f"{paths.INDEX} names {name}, which is not a shard in the manifest"
    for name in sorted(shards - wrong):
        yield from _header_problems(view.path / name, expected.get(name, {}))


def _train_state_problems(view: StepView) -> Iterator[str]:
    try:
        objects = {name: json_values.decode(value) for name, value in view.train_state().items()}
        if view.manifest.provenance.step is not None:
            check_counters(objects, step=view.manifest.provenance.step)
    except DamagedCheckpointError as error:
        yield _without_name(error, view.path)
        return
    except (ValueError, TypeError, RecursionError) as error:
        yield f"{paths.TRAIN_STATE}: {error}"
        return


def _problems_of(view: StepView, read: Callable[[], object]) -> Iterator[str]:
    try:
        read()
    except DamagedCheckpointError as error:
        yield _without_name(error, view.path)


def _chunks_by_file(entries: dict[str, TensorEntry]) -> dict[str, dict[str, list[tuple[str, Chunk]]]]:
    """Return file -> tensor -> dtype and chunks that the index places there."""
    found: dict[str, dict[str, list[tuple[str, Chunk]]]] = {}
    for name, entry in entries.items():
        for chunk in entry.chunks:
            found.setdefault(chunk.file, {}).setdefault(name, []).append((entry.dtype, chunk))
    return found


def _header_problems(path: Path, expected: dict[str, list[tuple[str, Chunk]]]) -> Iterator[str]:
    try:
        header = safetensors_file.read_header(path)
    except ValueError as error:
        yield f"{path.name}: {error}"
        return
    for name in sorted(header.keys() | expected.keys()):
        in_index = expected.get(name, [])
        if name not in header:
            yield f"{path.name} does not hold {name}, which {paths.INDEX} places there"
        elif not in_index:
            yield f"{path.name} holds {name}, which {paths.INDEX} does not place there"
        elif in_index != [header[name]]:
            yield f"{path.name} and {paths.INDEX} disagree on {name}"


def _without_name(error: DamagedCheckpointError, path: Path) -> str:
    """Return the error without the step's name, which the report has already."""
    return str(error).removeprefix(f"{path.name} is damaged: ")


def _default_threads() -> int:
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))
