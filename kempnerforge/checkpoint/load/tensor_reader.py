"""Read boxes (rectangular parts) of tensors from a step's shards. Only verified bytes are used."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kempnerforge.checkpoint import cuda
from kempnerforge.checkpoint.format import paths, safetensors_file
from kempnerforge.checkpoint.format.checksums import BLOCK_BYTES, FileRecord, VerifiedFile
from kempnerforge.checkpoint.format.tensor_index import Chunk
from kempnerforge.errors import DamagedCheckpointError


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A box of a tensor, read from one chunk."""

    name: str
    dtype: str
    """Safetensors name, as in the index."""
    chunk: Chunk
    starts: tuple[int, ...]
    """Where the box begins in the chunk."""
    target: torch.Tensor
    """A tensor with the shape of the box and this dtype, on any device."""

    @property
    def whole_rows(self) -> bool:
        """Whether the box spans whole rows of the chunk, along dimension 0."""
        return self.target.shape[1:] == self.chunk.sizes[1:]

    @property
    def row_bytes(self) -> int:
        """Size of one row of the chunk."""
        return math.prod(self.chunk.sizes[1:]) * self.target.element_size()

    @property
    def begin(self) -> int:
        """Offset in the file of the first row that the box touches."""
        return self.chunk.begin + (self.starts[0] * self.row_bytes if self.starts else 0)

    @property
    def is_straight(self) -> bool:
        """Whether bytes can be read from the file straight into the target."""
        return self.target.device.type == "cpu" and self.is_same_bytes

    @property
    def is_same_bytes(self) -> bool:
        """Whether the target is contiguous and its bytes equal those in the file, on any device."""
        target = self.target
        return self.whole_rows and target.is_contiguous() and not (target.is_conj() or target.is_neg())


def read_parts(step_folder: Path, files: Mapping[str, FileRecord], parts: Iterable[TensorSlice]) -> None:
    """Fill the targets, file by file, in the order of the bytes.

    After an error the content of the targets is undefined. Raises DamagedCheckpointError and
    OSError.
    """
    per_file: dict[str, list[TensorSlice]] = {}
    for part in parts:
        if part.target.numel():
            per_file.setdefault(part.chunk.file, []).append(part)
    on_cuda = (part.target.device for of_file in per_file.values() for part in of_file if part.target.is_cuda)
    buffer = cuda.host_buffer(BLOCK_BYTES, next(on_cuda, None))
    for name, wanted in sorted(per_file.items()):
        record = files.get(name)
        if record is None:
            raise DamagedCheckpointError(f"{step_folder.name} is damaged: {name} is not in the manifest")
        with VerifiedFile(step_folder / name, record, buffer=_memory(buffer)) as file:
            _check_header(file, wanted)
            file.read_into((part.begin, _memory(part.target)) for part in wanted if part.is_straight)
            for part in sorted(wanted, key=lambda part: part.begin):
                if not part.is_straight:
                    _fill(file, part)


def _check_header(file: VerifiedFile, wanted: Sequence[TensorSlice]) -> None:
    """Check that the header of a shard agrees with the index.

    If two shards are swapped both on disk and in the manifest, their digests are correct, but their
    headers differ from the index.
    """
    name = file.path.name
    try:
        header, data_begin = safetensors_file.parse_header(file.read, file.record.size_bytes)
        offsets = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
        for part in wanted:
            stored, chunk = header[part.name], part.chunk
            same = (
                stored["dtype"] == part.dtype
                and tuple(stored["shape"]) == chunk.sizes
                and stored["data_offsets"] == [chunk.begin - data_begin, chunk.end - data_begin]
                and tuple(offsets[part.name]["saved_offsets"]) == chunk.offsets
            )
            if not same:
                raise KeyError(part.name)
    except KeyError as error:
        raise DamagedCheckpointError(
            f"{file.path.parent.name} is damaged: {name} and {paths.INDEX} disagree on {error}"
        ) from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(
            f"{file.path.parent.name} is damaged: {name}: its header cannot be read ({error})"
        ) from None


def _memory(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous host tensor. Going through numpy takes five times as long."""
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(memory).cast("B")


def _fill(file: VerifiedFile, part: TensorSlice) -> None:
    """Fill a target that cannot be read straight from the file: on another device, or a part of the rows."""
    target = part.target if part.target.ndim else part.target.unsqueeze(0)
    rows = target.shape[0]
    begin, row_bytes = part.begin, part.row_bytes
    if part.is_same_bytes:
        flat, done = part.target.view(-1).view(torch.uint8), 0
        for piece in file.parts(begin, begin + rows * row_bytes):
            flat[done : done + piece.nbytes].copy_(torch.frombuffer(piece, dtype=torch.uint8))
            done += piece.nbytes
        return
    at_once = max(1, BLOCK_BYTES // max(1, row_bytes))
    for first in range(0, rows, at_once):
        count = min(at_once, rows - first)
        host = torch.empty((count, *part.chunk.sizes[1:]), dtype=target.dtype, device="cpu")
        file.read_into([(begin + first * row_bytes, _memory(host))])
        for dim in range(1, target.ndim):
            host = host.narrow(dim, part.starts[dim], target.shape[dim])
        target.narrow(0, first, count).copy_(host)
