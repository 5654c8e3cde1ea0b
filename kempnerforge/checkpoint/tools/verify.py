"""Checking a step byte by byte: every digest, and that its parts agree with each other.

Needs no torch, changes nothing, and never stops at the first fault.
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
"""Blocks that a thread checks in one go."""


@dataclass(frozen=True)
class Verified:
    """What came of checking one step."""

    path: Path
    problems: tuple[str, ...]
    """Everything that is wrong with it."""
    foreign: tuple[str, ...]
    """Files in its folder that the manifest does not know; they do no harm."""
    size_bytes: int
    """Bytes that were digested."""

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(
    path: Path, *, threads: int | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Verified:
    """Check every byte of the step in ``path``, which is held against retention meanwhile.

    ``progress`` is told of the bytes done so far and of all. Raises StepNotFoundError when the step is or
    goes away, UnreachableCheckpointError when it cannot be read: that says nothing about it; MismatchError
    for another format.
    """
    with read_locks.lock_for_reading(path, what="verify"):
        try:
            return _verify(path, threads or _default_threads(), progress)
        except OSError as error:
            if not path.is_dir():
                raise StepNotFoundError(f"{path} went away while it was read") from None
            raise UnreachableCheckpointError(f"{path} cannot be read: {error}. It may be sound") from error


def _verify(path: Path, threads: int, progress: Callable[[int, int], None]) -> Verified:
    try:
        found = _manifest_of(path)
    except DamagedCheckpointError as error:
        if not path.is_dir():
            raise StepNotFoundError(f"{path} went away while it was read") from None
        return Verified(path, (_without_name(error, path),), (), 0)
    known = {paths.MANIFEST, *found.files}
    unknown = sorted(entry.name for entry in path.iterdir() if entry.name not in known)
    problems = [
        f"{name} is not in the manifest, and tools that read all shards would read it"
        for name in unknown
        if name.endswith(paths.SHARD_SUFFIX)
    ]
    wrong = _wrong_blocks(path, found, threads, progress)
    problems += [problem for name in sorted(wrong) for problem in wrong[name]]
    problems += _disagreements(StepView(path, found), set(wrong))
    foreign = tuple(name for name in unknown if not name.endswith(paths.SHARD_SUFFIX))
    return Verified(path, tuple(problems), foreign, found.size_bytes)


def _manifest_of(path: Path) -> Manifest:
    """A step's manifest; a state dict that was saved without a run may have the name of a step too."""
    try:
        return manifest.load(path, step=paths.step_number(path.name))
    except NoTrainingStateError:
        return manifest.load(path)


def _wrong_blocks(
    path: Path, found: Manifest, threads: int, progress: Callable[[int, int], None]
) -> dict[str, list[str]]:
    """File -> what is wrong with which of its bytes, digested by several threads."""
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
        # An interrupt must not wait for terabytes that are still queued.
        executor.shutdown(cancel_futures=True)
    return wrong


def _disagreements(view: StepView, wrong: set[str]) -> Iterator[str]:
    """What does not fit together in a step, leaving out files of which bytes are known to be wrong."""
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
        yield f"{paths.INDEX} names {name}, which is no shard of the manifest"
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
    """File -> tensor -> dtype and chunks that the index places there."""
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
    """The error without the name of the step, which the report gives once."""
    return str(error).removeprefix(f"{path.name} is damaged: ")


def _default_threads() -> int:
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))
