"""Export the weights of a step as a Hugging Face model folder, whatever layout they were saved with.

Each file of the step is read once, in the order of its bytes, in verified blocks. Each piece of a
block is written directly to its offsets in the new files. So an export needs memory for a few
blocks only, whatever the size of the model and its tensors, and reads no block twice, however many
ranks share a tensor. Needs no torch.

The weights of a schedule-free optimizer are those to evaluate, which are computed from two tensors
of the step.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kempnerforge import fsio
from kempnerforge.checkpoint.format import evaluation_weights, hf_format, paths
from kempnerforge.checkpoint.format.checksums import VerifiedFile
from kempnerforge.checkpoint.format.evaluation_weights import EvaluationWeights
from kempnerforge.checkpoint.format.hf_format import MappedTensor, PlannedFile
from kempnerforge.checkpoint.format.step_info import StepView
from kempnerforge.checkpoint.format.tensor_index import ITEM_BYTES, Chunk, TensorEntry
from kempnerforge.checkpoint.tools import staged_dir
from kempnerforge.checkpoint.tools.float_cast import FLOATS, cast
from kempnerforge.errors import DamagedCheckpointError, MismatchError, RunFolderError

Progress = Callable[[int, int], None]
"""Called with the bytes done so far, and the total."""

PIECE_BYTES = 4 << 20
_MAX_OPEN_FILES = 64


@dataclass(frozen=True)
class Exported:
    """Result of an export."""

    path: Path
    dtype: str
    """Safetensors name."""
    num_parameters: int
    size_bytes: int
    """Size of all files."""
    files: tuple[str, ...]
    evaluation_weights_of: str = ""
    """Class of the schedule-free optimizer whose evaluation weights were exported; empty without one."""
    training_weights_of: str = ""
    """Class of an optimizer with evaluation weights that are not known; empty without one."""


@dataclass(frozen=True)
class _Target:
    """The destination of a tensor."""

    tensor: MappedTensor
    source_dtype: str
    dtype: str
    file: str
    begin: int
    """Offset of its first element."""


def export(
    view: StepView,
    out: Path,
    tensors: Sequence[MappedTensor],
    *,
    dtype: str,
    small_files: Mapping[str, bytes],
    keep_other_dtypes: bool = False,
    max_shard_bytes: int = hf_format.SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> Exported:
    """Write the weights of a step, cast to ``dtype`` (safetensors name), and ``small_files``, to ``out``.

    ``tensors`` must name every weight of the step. ``keep_other_dtypes`` allows weights of dtypes
    that cannot be cast, and leaves them as they are. The caller holds a read lock on the step.
    ``out`` is complete and durable when it appears. Raises RunFolderError if it exists or cannot be
    written, MismatchError, DamagedCheckpointError, NoSpaceError; OSError if the step cannot be
    read.
    """
    entries = view.tensors()
    _check_fits(view, entries, tensors, keep_other_dtypes=keep_other_dtypes)
    weights = evaluation_weights.in_step(view.train_state(), entries)
    mixer = _Mixer(view, entries, weights)
    sources = [entries[paths.MODEL_PREFIX + tensor.name].dtype for tensor in tensors]
    dtypes = [dtype if source in FLOATS else source for source in sources]
    files = hf_format.plan_files(tensors, dtypes, max_shard_bytes)
    small = {hf_format.INDEX: hf_format.index_json(files), **small_files}
    size_bytes = sum(file.size_bytes for file in files) + sum(map(len, small.values()))
    out = Path(os.path.abspath(out))
    with staged_dir.begin(out, what="export", purpose="a new folder") as building:
        staged_dir.require_room(building, size_bytes, len(files) + len(small), what="export")
        for file in files:
            _create(building / file.name, file)
        _copy(view, building, _targets(entries, tensors, dtypes, files), progress, mixer)
        for file in files:
            _sync(building / file.name)
        for name, data in small.items():
            fsio.write_new_file(building / name, data)
        fsio.fsync_folder(building)
        fsio.publish(building, out)
    num_parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    names = (*(file.name for file in files), *small)
    return Exported(out, dtype, num_parameters, size_bytes, names, weights.optimizer, weights.unknown)


def _check_fits(
    view: StepView,
    entries: Mapping[str, TensorEntry],
    tensors: Sequence[MappedTensor],
    *,
    keep_other_dtypes: bool,
) -> None:
    """Raise MismatchError unless the step has exactly these weights, in floating point."""
    problems, wanted = [], set()
    for tensor in tensors:
        name = paths.MODEL_PREFIX + tensor.name
        wanted.add(name)
        entry = entries.get(name)
        if entry is None:
            problems.append(f"{name} is not in the checkpoint")
        elif entry.shape != tensor.shape:
            problems.append(f"{name} has shape {entry.shape}, but {tensor.shape} by the config")
        elif entry.dtype not in FLOATS and not keep_other_dtypes:
            problems.append(f"{name} is {entry.dtype}; {', '.join(FLOATS)} can be exported")
    extra = [name for name in entries if name.startswith(paths.MODEL_PREFIX) and name not in wanted]
    problems += [f"{name} has no name in Hugging Face's Llama" for name in extra]
    if problems:
        raise MismatchError(f"{view.path} cannot be exported:{hf_format.listed(problems)}")


def _targets(
    entries: Mapping[str, TensorEntry],
    tensors: Sequence[MappedTensor],
    dtypes: Sequence[str],
    files: Sequence[PlannedFile],
) -> dict[str, list[tuple[Chunk, _Target]]]:
    """Return file of the step -> its chunks and their destinations, in the order of their bytes."""
    locations = {name: (file.name, begin) for file in files for name, begin in file.begins.items()}
    found: dict[str, list[tuple[Chunk, _Target]]] = {}
    for tensor, dtype in zip(tensors, dtypes, strict=True):
        entry = entries[paths.MODEL_PREFIX + tensor.name]
        target = _Target(tensor, entry.dtype, dtype, *locations[tensor.hf_name])
        for chunk in entry.chunks:
            found.setdefault(chunk.file, []).append((chunk, target))
    return {
        name: sorted(pairs, key=lambda pair: (pair[0].begin, pair[0].end))
        for name, pairs in sorted(found.items())
    }


def _copy(
    view: StepView,
    building: Path,
    work: Mapping[str, Sequence[tuple[Chunk, _Target]]],
    progress: Progress,
    mixer: _Mixer,
) -> None:
    done = 0
    total = sum(chunk.end - chunk.begin for pairs in work.values() for chunk, _ in pairs)
    outputs = _Outputs(building)
    try:
        for name, pairs in work.items():
            with _open(view, name) as source:
                for chunk, target in pairs:
                    at = chunk.begin
                    for part in _pieces(source, chunk):
                        _write(mixer.mixed(part, at, chunk, target), at, chunk, target, outputs)
                        at += part.nbytes
                        done += part.nbytes
                        progress(done, total)
    finally:
        outputs.close()
        mixer.close()


def _open(view: StepView, name: str) -> VerifiedFile:
    record = view.manifest.files.get(name)
    if record is None:
        raise DamagedCheckpointError(f"{view.path.name} is damaged: {name} is not in the manifest")
    return VerifiedFile(view.path / name, record)


class _Mixer:
    """Computes the weights to evaluate from those of training, piece by piece."""

    def __init__(
        self, view: StepView, entries: Mapping[str, TensorEntry], weights: EvaluationWeights
    ) -> None:
        self._view = view
        self._weights = weights
        self._chunks = {
            name: {(tuple(c.offsets), tuple(c.sizes)): c for c in entries[z_name].chunks}
            for name, z_name in weights.z_names.items()
        }
        self._is_fp32 = {name: entries[z_name].dtype == "F32" for name, z_name in weights.z_names.items()}
        self._open: tuple[str, VerifiedFile] | None = None

    def mixed(self, part: memoryview, at: int, chunk: Chunk, target: _Target) -> memoryview:
        """Return the weights to evaluate for ``part``, which begins at byte ``at`` of the chunk's file."""
        name = target.tensor.name
        if name not in self._chunks:
            return part
        other = self._chunks[name].get((tuple(chunk.offsets), tuple(chunk.sizes)))
        if other is None or target.source_dtype != "F32" or not self._is_fp32[name]:
            raise MismatchError(
                f"{self._view.path} cannot be exported: {name} and its z are not stored alike in fp32, so "
                f"the evaluation weights of {self._weights.optimizer} cannot be computed"
            )
        begin = other.begin + at - chunk.begin
        z = self._file(other.file).view(begin, begin + part.nbytes)
        y, z_values = np.frombuffer(part, dtype="<f4"), np.frombuffer(z, dtype="<f4")
        return evaluation_weights.evaluation_weights(y, z_values, self._weights.factors[name]).data.cast("B")

    def _file(self, name: str) -> VerifiedFile:
        """Return the open file ``name``. One is kept open: pieces of a rank are in the same file."""
        if self._open is None or self._open[0] != name:
            self.close()
            self._open = (name, _open(self._view, name))
        return self._open[1]

    def close(self) -> None:
        """Close the file that is open."""
        if self._open is not None:
            self._open[1].close()
            self._open = None


def _pieces(source: VerifiedFile, chunk: Chunk) -> Iterator[memoryview]:
    """Yield the verified bytes of a chunk, in pieces small enough to be cast in the CPU cache."""
    for part in source.parts(chunk.begin, chunk.end):
        for begin in range(0, part.nbytes, PIECE_BYTES):
            yield part[begin : begin + PIECE_BYTES]


def _write(part: memoryview, at: int, chunk: Chunk, target: _Target, outputs: _Outputs) -> None:
    """Cast ``part``, which begins at byte ``at`` of the chunk's file, and write its runs to their offsets."""
    dtype = target.dtype
    item, out_item = ITEM_BYTES[target.source_dtype], ITEM_BYTES[dtype]
    first = (at - chunk.begin) // item
    try:
        data = cast(np.frombuffer(part, dtype=np.uint8), target.source_dtype, dtype).data
    except OverflowError as error:
        raise MismatchError(
            f"{target.tensor.name} holds {error}, which {dtype} cannot represent; use another --dtype"
        ) from None
    fd = outputs.open(target.file)
    for element, begin, end in _runs(chunk, target.tensor, first, first + part.nbytes // item):
        run = data[(begin - first) * out_item : (end - first) * out_item]
        outputs.write_at(fd, run, target.begin + element * out_item)


def _runs(chunk: Chunk, tensor: MappedTensor, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Split elements ``first`` to ``last`` of a chunk into runs that are contiguous in the new tensor too.

    Yields (element of the new tensor, first, last).
    """
    order = tensor.row_order
    if not order:
        yield from _plain_runs(chunk, tensor.shape, first, last)
        return
    width, box_width = tensor.shape[1], chunk.sizes[1]
    row_0, column = chunk.offsets
    place_of = {ours: theirs for theirs, ours in enumerate(order)}
    while first < last:
        row, at = divmod(first, box_width)
        end = min(last, (row + 1) * box_width)
        group, inside = divmod(row + row_0, len(order))
        row = group * len(order) + place_of[inside]
        yield row * width + column + at, first, end
        first = end


def _plain_runs(chunk: Chunk, shape: Sequence[int], first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Return the runs of a tensor of any number of dimensions, whose rows keep their order."""
    # All dimensions after this one are whole.
    cut = max((dim for dim, size in enumerate(shape) if chunk.sizes[dim] != size), default=0)
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    run = math.prod(chunk.sizes[cut:])
    while first < last:
        number, at = divmod(first, run)
        end = min(last, (number + 1) * run)
        place = at + (chunk.offsets[cut] * strides[cut] if shape else 0)
        for dim in reversed(range(cut)):
            number, index = divmod(number, chunk.sizes[dim])
            place += (chunk.offsets[dim] + index) * strides[dim]
        yield place, first, end
        first = end


def _create(path: Path, file: PlannedFile) -> None:
    try:
        with os.fdopen(fsio.open_file(path, os.O_WRONLY | os.O_EXCL), "wb") as new:
            new.write(file.header)
            new.truncate(file.size_bytes)
    except OSError as error:
        raise _not_written(path, error) from error


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        os.close(fd)


def _not_written(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(f"{path} cannot be written: {error}. Nothing was left behind")


class _Outputs:
    """Files written at any offset. The most recently used ones are kept open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[str, int] = OrderedDict()

    def open(self, name: str) -> int:
        """Return a descriptor of the file ``name``, valid until the next call."""
        fd = self._open.pop(name, None)
        if fd is None:
            fd = os.open(self._folder / name, os.O_WRONLY | os.O_CLOEXEC)
        self._open[name] = fd
        if len(self._open) > _MAX_OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        return fd

    def write_at(self, fd: int, data: memoryview, offset: int) -> None:
        """Write all of ``data``. Raises RunFolderError."""
        try:
            while data.nbytes:
                written = os.pwrite(fd, data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            raise _not_written(self._folder, error) from error

    def close(self) -> None:
        """Close all files."""
        for fd in self._open.values():
            os.close(fd)
