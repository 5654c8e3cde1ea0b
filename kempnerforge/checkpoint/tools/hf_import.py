"""Import a Hugging Face model folder as a committed checkpoint with only weights. Needs no torch.

Weights are cast to fp32, the dtype that training uses, and written in the order of the new files, a
few megabytes at a time. So memory does not depend on the size of the model or its tensors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kempnerforge import fsio
from kempnerforge.checkpoint.format import hf_format, paths
from kempnerforge.checkpoint.format.checksums import DigestingFile
from kempnerforge.checkpoint.format.hf_format import MappedTensor, Stored
from kempnerforge.checkpoint.format.manifest import Provenance
from kempnerforge.checkpoint.format.safetensors_file import ShardItem, plan_image
from kempnerforge.checkpoint.format.tensor_index import ITEM_BYTES
from kempnerforge.checkpoint.save.commit import (
    CheckpointPayload,
    ExpectedFiles,
    FileReport,
    PlannedFile,
    PlannedItem,
    commit,
)
from kempnerforge.checkpoint.tools import staged_dir
from kempnerforge.checkpoint.tools.float_cast import FLOATS, cast
from kempnerforge.errors import DamagedCheckpointError, MismatchError

Progress = Callable[[int, int], None]
"""Called with the bytes done so far, and the total."""

DTYPE = "F32"
PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class Imported:
    """Result of an import."""

    path: Path
    num_parameters: int
    size_bytes: int
    """Size of all files."""
    num_files: int
    """Number of files with weights."""


def import_weights(
    source: Path,
    out: Path,
    tensors: Sequence[MappedTensor],
    *,
    redundant: Mapping[str, str],
    special_tokens: Mapping[str, Any],
    config_toml: str,
    progress: Progress = lambda done, total: None,
) -> Imported:
    """Write the weights in the Hugging Face folder ``source`` to ``out``, a checkpoint at step 0.

    ``redundant``: names that ``source`` may have besides ``tensors`` -> the name of the tensor with
    the same bytes, or an empty string to ignore the tensor. ``special_tokens`` is stored for
    exports. The checkpoint is complete and durable when it appears. Raises MismatchError,
    StepNotFoundError, DamagedCheckpointError, RunFolderError if ``out`` exists or cannot be created,
    NoSpaceError, OSError.
    """
    stored = hf_format.find_tensors(source)
    _check_fits(source, stored, tensors, redundant)
    files = _plan(tensors)
    expected = ExpectedFiles(tuple(files))
    of_ours = {paths.MODEL_PREFIX + tensor.name: tensor for tensor in tensors}
    total, done = sum(_size_bytes(stored[tensor.hf_name]) for tensor in tensors), 0

    def advance(size_bytes: int) -> None:
        nonlocal done
        done += size_bytes
        progress(done, total)

    out = Path(os.path.abspath(out))
    with staged_dir.begin(out, what="import", purpose="a new checkpoint's folder") as building:
        staged_dir.require_room(building, expected.size_bytes, len(files) + 4, what="import")
        reports = {file.name: _write_file(building, file, of_ours, stored, advance) for file in files}
        contents = CheckpointPayload(
            Provenance(step=0, reason="import"),
            {"imported_from": {"format": "hf", "path": str(source.resolve()), **special_tokens}},
            config_toml,
        )
        size_bytes = commit(building, out, expected=expected, reports=reports, contents=contents)
    num_parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    return Imported(out, num_parameters, size_bytes, len(files))


def _check_fits(
    source: Path, stored: Mapping[str, Stored], tensors: Sequence[MappedTensor], redundant: Mapping[str, str]
) -> None:
    """Raise MismatchError unless ``source`` has exactly these tensors, in floating point."""
    problems = []
    for tensor in tensors:
        found = stored.get(tensor.hf_name)
        if found is None:
            problems.append(f"{tensor.hf_name} is missing")
        elif found.shape != tensor.shape:
            problems.append(f"{tensor.hf_name} has shape {found.shape}, but {tensor.shape} by config.json")
        elif found.dtype not in FLOATS:
            problems.append(f"{tensor.hf_name} is {found.dtype}; {', '.join(FLOATS)} can be imported")
    known = {tensor.hf_name for tensor in tensors}
    for name in sorted(stored.keys() - known):
        if name not in redundant:
            problems.append(f"{name} is not a weight of a Llama")
        elif (twin := redundant[name]) and not problems and not _same_bytes(stored[name], stored[twin]):
            problems.append(f"{name} differs from {twin}, but config.json ties them (tie_word_embeddings)")
    if problems:
        raise MismatchError(f"{source} cannot be imported:{hf_format.listed(problems)}")


def _plan(tensors: Sequence[MappedTensor]) -> list[PlannedFile]:
    """Plan files of at most 5 GB, because several ranks can read several files at once."""
    tensors = sorted(tensors, key=lambda tensor: tensor.name)
    items = [
        PlannedItem(
            ShardItem(paths.MODEL_PREFIX + tensor.name, DTYPE, (0,) * len(tensor.shape), tensor.shape),
            tensor.shape,
        )
        for tensor in tensors
    ]
    groups = hf_format.group_by_size([planned.item.size_bytes for planned in items], hf_format.SHARD_BYTES)
    return [
        PlannedFile(paths.shard_name(number, len(groups)), tuple(items[position] for position in group))
        for number, group in enumerate(groups)
    ]


def _write_file(
    building: Path,
    file: PlannedFile,
    of_ours: Mapping[str, MappedTensor],
    stored: Mapping[str, Stored],
    advance: Callable[[int], None],
) -> FileReport:
    image = plan_image(file.shard_items)
    new = DigestingFile(building / file.name)
    try:
        new.write(memoryview(image.header))
        for position in image.order:
            tensor = of_ours[file.items[position].item.name]
            _write_tensor(new, tensor, stored[tensor.hf_name], advance)
        record = new.finish()
    finally:
        new.close()
    return FileReport(record, xxhash.xxh3_128_hexdigest(image.header))


def _write_tensor(
    new: DigestingFile, tensor: MappedTensor, source: Stored, advance: Callable[[int], None]
) -> None:
    """Write some rows at a time, in whole groups: ``row_order`` permutes the rows within a group."""
    order = np.argsort(tensor.row_order)
    group = max(1, len(order))
    group_bytes = group * math.prod(source.shape[1:]) * ITEM_BYTES[source.dtype]
    fd = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        begin, end = source.begin, source.begin + _size_bytes(source)
        step = max(1, PIECE_BYTES // group_bytes) * group_bytes
        for at in range(begin, end, step):
            data = _read(fd, source, at, min(at + step, end))
            if len(order):
                data = data.reshape(-1, len(order), group_bytes // len(order))[:, order].reshape(-1)
            new.write(cast(data, source.dtype, DTYPE).data)
            advance(data.nbytes)
    finally:
        os.close(fd)


def _same_bytes(first: Stored, second: Stored) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with open(first.path, "rb") as file, open(second.path, "rb") as twin:
        size_bytes = _size_bytes(first)
        for at in range(0, size_bytes, PIECE_BYTES):
            end = min(at + PIECE_BYTES, size_bytes)
            data = _read(file.fileno(), first, first.begin + at, first.begin + end)
            if not np.array_equal(data, _read(twin.fileno(), second, second.begin + at, second.begin + end)):
                return False
    return True


def _read(fd: int, source: Stored, begin: int, end: int) -> np.ndarray:
    data = np.empty(end - begin, dtype=np.uint8)
    if fsio.read_range(fd, data.data, begin) < data.nbytes:
        raise DamagedCheckpointError(f"{source.path} ends before byte {end}")
    return data


def _size_bytes(source: Stored) -> int:
    return math.prod(source.shape) * ITEM_BYTES[source.dtype]
