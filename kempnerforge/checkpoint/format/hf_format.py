"""The layout of a Hugging Face model folder: safetensors files of whole tensors, and their index."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kempnerforge.checkpoint.format import safetensors_file
from kempnerforge.checkpoint.format.tensor_index import ITEM_BYTES
from kempnerforge.errors import DamagedCheckpointError, MismatchError, StepNotFoundError
from kempnerforge.fsio import GIT_LFS_POINTER

CONFIG = "config.json"
GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
SHARD_BYTES = 5 * 10**9
"""Maximum size of a file, unless a single tensor is larger: the usual ``max_shard_size``."""

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_ALIGNMENT = 8
MAX_SHOWN = 8


class MappedTensor(Protocol):
    """A weight with its two names and the order of its rows, such as ``kempnerforge.model.hf.HfTensor``."""

    @property
    def name(self) -> str:
        """The name in this package, without the prefix ``model.`` of checkpoints."""
        ...

    @property
    def hf_name(self) -> str:
        """The name in Hugging Face models."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, which is the same in both."""
        ...

    @property
    def row_order(self) -> tuple[int, ...]:
        """Row i of the Hugging Face tensor is row row_order[i] here, in each group of len(row_order) rows.

        Empty if the order is the same.
        """
        ...


@dataclass(frozen=True)
class Stored:
    """A whole tensor in a file of the folder."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Its first byte in the file."""


@dataclass(frozen=True)
class PlannedFile:
    """A file to write: its header, and the offset of each tensor."""

    name: str
    header: bytes
    begins: dict[str, int]
    """Name in the Hugging Face model -> offset in the file."""
    size_bytes: int


def plan_files(
    tensors: Sequence[MappedTensor], dtypes: Sequence[str], max_shard_bytes: int
) -> list[PlannedFile]:
    """Distribute ``tensors``, in order, over files of at most ``max_shard_bytes`` of weights."""
    sizes = [
        math.prod(tensor.shape) * ITEM_BYTES[dtype] for tensor, dtype in zip(tensors, dtypes, strict=True)
    ]
    groups = group_by_size(sizes, max_shard_bytes)
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return [
        _plan_file(name, [(tensors[position], dtypes[position]) for position in group])
        for name, group in zip(names if count > 1 else [ONE_FILE], groups, strict=True)
    ]


def group_by_size(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Group positions of ``sizes`` into consecutive groups of at most ``most``.

    A size larger than that forms its own group.
    """
    groups: list[list[int]] = []
    room = -1
    for position, size in enumerate(sizes):
        if size > room or not groups:
            groups.append([])
            room = most
        groups[-1].append(position)
        room -= size
    return groups


def _plan_file(name: str, tensors: Sequence[tuple[MappedTensor, str]]) -> PlannedFile:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, cursor = {}, 0
    for tensor, dtype in tensors:
        end = cursor + math.prod(tensor.shape) * ITEM_BYTES[dtype]
        header[tensor.hf_name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [cursor, end]}
        offsets[tensor.hf_name], cursor = cursor, end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    prefix = len(raw).to_bytes(8, "little") + raw
    begins = {tensor: len(prefix) + offset for tensor, offset in offsets.items()}
    return PlannedFile(name, prefix, begins, len(prefix) + cursor)


def index_json(files: Sequence[PlannedFile]) -> bytes:
    """Return the bytes of ``model.safetensors.index.json``."""
    total = sum(file.size_bytes - len(file.header) for file in files)
    where = {tensor: file.name for file in files for tensor in file.begins}
    return json_bytes({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def json_bytes(body: Any) -> bytes:
    """Return a JSON file as Hugging Face's tools write it."""
    return (json.dumps(body, indent=2) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raise StepNotFoundError for a missing file, MismatchError for anything else."""
    try:
        raw = path.read_bytes()
        _refuse_lfs_pointer(path, raw)
        body = json.loads(raw)
    except FileNotFoundError:
        raise StepNotFoundError(
            f"{path} does not exist; give a Hugging Face model's folder, with {CONFIG} and .safetensors files"
        ) from None
    except (ValueError, RecursionError) as error:
        raise MismatchError(f"{path} cannot be parsed: {error}") from None
    if not isinstance(body, dict):
        raise MismatchError(f"{path} is not a JSON object")
    return body


def find_tensors(folder: Path) -> dict[str, Stored]:
    """Return name -> location of every tensor of a model in one file, or in the files of its index.

    Reads headers, but no weights. Raises StepNotFoundError, MismatchError, DamagedCheckpointError,
    OSError.
    """
    if (folder / INDEX).exists():
        return _by_index(folder, read_json(folder / INDEX))
    if (folder / ONE_FILE).exists():
        return _in_file(folder / ONE_FILE)
    raise StepNotFoundError(f"{folder} has neither {ONE_FILE} nor {INDEX}{_other_weights(folder)}")


def _other_weights(folder: Path) -> str:
    """Return which other weights the folder has, and what to do; empty if there are none."""
    if next(folder.glob("consolidated*.safetensors"), None) is not None:
        return (
            ". consolidated.safetensors has the names of the model's authors, not those of Hugging Face: "
            f"download {ONE_FILE}, or model-*.safetensors and {INDEX}, of the same model"
        )
    if shards := sorted(path.name for path in folder.glob("*.safetensors")):
        return (
            f", which says what {shards[0]} holds: download it, or save the model again with save_pretrained"
        )
    pickled = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern))
    if pickled:
        return (
            f". {pickled[0]} is a pickle, which is never loaded: save the model as safetensors with "
            "transformers' save_pretrained"
        )
    return ""


def _by_index(folder: Path, index: Mapping[str, Any]) -> dict[str, Stored]:
    where = index.get("weight_map")
    if not isinstance(where, dict) or not where:
        raise MismatchError(f"{folder / INDEX} has no weight_map")
    for name in where.values():
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise MismatchError(
                f"{folder / INDEX} names {name!r}, which is not a safetensors file of this folder"
            )
    found: dict[str, Stored] = {}
    for name in sorted(set(where.values())):
        for tensor, stored in _in_file(folder / name).items():
            if where.get(tensor) != name:
                raise MismatchError(f"{folder / name} holds {tensor}, which {INDEX} does not place there")
            found[tensor] = stored
    if missing := sorted(where.keys() - found.keys()):
        raise MismatchError(
            f"{folder / where[missing[0]]} does not hold {missing[0]}, which {INDEX} places there"
        )
    return found


def _in_file(path: Path) -> dict[str, Stored]:
    try:
        entries = safetensors_file.read_header(path, sharded=False)
    except FileNotFoundError:
        raise MismatchError(f"{path} is missing, but {INDEX} names it") from None
    except ValueError as error:
        with open(path, "rb") as file:
            _refuse_lfs_pointer(path, file.read(len(GIT_LFS_POINTER)))
        raise DamagedCheckpointError(f"{path} is damaged: {error}") from None
    return {name: Stored(path, dtype, box.sizes, box.begin) for name, (dtype, box) in entries.items()}


def _refuse_lfs_pointer(path: Path, begin: bytes) -> None:
    if begin.startswith(GIT_LFS_POINTER):
        raise MismatchError(
            f"{path} is a git-lfs pointer, not the file itself: run git lfs pull in {path.parent}"
        )


def listed(problems: Sequence[str]) -> str:
    """Return the first few problems, one per line, and the number of the others."""
    more = [f"and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
    return "".join(f"\n  {problem}" for problem in [*problems[:MAX_SHOWN], *more])
