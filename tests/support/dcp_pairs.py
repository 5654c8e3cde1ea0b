"""Save and load one state with both stock DCP and our implementation, and compare bit for bit.

    for way in WAYS:                                     # stock DCP, our three modes, our StorageWriter
        save_by(way, state, folder / way)
        load_by(way, target := make_target(), folder / way)
        assert_same(target, state)

``save_by`` and ``load_by`` are collective if there is a process group.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys, load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor

from kempnerforge import AsyncCheckpointer, SafetensorsReader, SafetensorsWriter

STOCK = "stock"
WRITER = "writer"
MODES = ("disabled", "async", "async_with_pinned_mem")
OURS = (*MODES, WRITER)
WAYS = (STOCK, *OURS)

State = dict[str, Any]


def save_by(
    way: str,
    state: State,
    path: Path,
    group: dist.ProcessGroup | None = None,
    planner: SavePlanner | None = None,
) -> None:
    """Save ``state`` as ``path`` in one of ``WAYS``, durably. Our modes do not use ``planner``."""
    if way in MODES:
        with AsyncCheckpointer(way) as checkpointer:
            checkpointer.save(state, path, group)
        if group is not None or dist.is_initialized():
            dist.barrier(group)
        return
    # One thread per rank and no fsync, because the files of stock DCP are discarded.
    stock = FileSystemWriter(path, single_file_per_rank=True, sync_files=False)
    writer = SafetensorsWriter(path) if way == WRITER else stock
    with _quiet():
        save(state, storage_writer=writer, process_group=group, planner=planner)


def reader_of(way: str, path: Path) -> StorageReader:
    """Return a reader of the files that ``save_by`` wrote."""
    return FileSystemReader(path) if way == STOCK else SafetensorsReader(path)


def load_by(
    way: str,
    target: State,
    path: Path,
    group: dist.ProcessGroup | None = None,
    planner: LoadPlanner | None = None,
) -> None:
    """Load the files that ``save_by`` wrote into ``target``."""
    with _quiet():
        load(target, storage_reader=reader_of(way, path), process_group=group, planner=planner)


def load_without_target(way: str, path: Path, keys: set[str] | str | None = None) -> State:
    """Return the content of ``path``, or the part that ``keys`` name, with its nesting."""
    with _quiet():
        return _load_state_dict_from_keys(keys, storage_reader=reader_of(way, path))


def compare(
    make_state: Callable[[], State],
    make_target: Callable[[], State],
    folder: Path,
    ways: Sequence[str] = WAYS,
) -> None:
    """Save and load in all ``ways``. Each must return what was saved, as stock DCP does."""
    for way in ways:
        save_by(way, make_state(), folder / way)
        target = make_target()
        load_by(way, target, folder / way)
        assert_same(target, make_state(), way)


def blank(value: Any) -> Any:
    """Return a target to load ``value`` into: the same structure with other values."""
    if isinstance(value, torch.Tensor):
        return torch.zeros(value.shape, dtype=value.dtype)
    if isinstance(value, dict):
        return {key: blank(item) for key, item in value.items()}
    return [blank(item) for item in value] if isinstance(value, list) else None


def failure_of(action: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """Return type and message of what a call raises. DCP's exception has those of all ranks that failed."""
    try:
        with _quiet():
            action(*args, **kwargs)
    except CheckpointException as error:
        failures = {rank: (type(cause).__name__, str(cause)) for rank, (cause, _) in error.failures.items()}
        return f"CheckpointException {failures}"
    except Exception as error:  # noqa: BLE001 - returned, so that the test can compare it
        return f"{type(error).__name__}: {error}"
    return "nothing"


def assert_same(found: Any, wanted: Any, where: str = "") -> None:
    """Check for equal types, dtypes, shapes, placements and bits at every depth.

    ``where`` is named in messages.
    """
    kinds = f"{where}: {type(found)} and {type(wanted)}"
    if isinstance(wanted, torch.Tensor):
        assert isinstance(found, torch.Tensor), kinds
        _assert_same_tensor(found, wanted, where)
    elif isinstance(wanted, Mapping):
        assert isinstance(found, Mapping), kinds
        assert set(found) == set(wanted), f"{where}: {set(found) ^ set(wanted)}"
        for key in wanted:
            assert_same(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list | tuple) and not isinstance(wanted, torch.Size):
        assert (type(found), len(found)) == (type(wanted), len(wanted)), kinds
        for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_same(one, other, f"{where}.{place}")
    else:
        assert type(found) is type(wanted), kinds
        _assert_same_leaf(found, wanted, where)


def _assert_same_leaf(found: Any, wanted: Any, where: str) -> None:
    if isinstance(wanted, np.ndarray | np.generic):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), where
        assert found.tobytes() == wanted.tobytes(), where
    elif isinstance(wanted, io.BytesIO):
        assert found.getvalue() == wanted.getvalue(), where
    elif isinstance(wanted, float):
        assert found.hex() == wanted.hex(), where
    else:
        assert found == wanted, where


def _assert_same_tensor(found: torch.Tensor, wanted: torch.Tensor, where: str) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), (
        f"{where}: {found.dtype} {found.shape} and {wanted.dtype} {wanted.shape}"
    )
    if isinstance(wanted, ShardedTensor):
        assert isinstance(found, ShardedTensor), where
        pairs = zip(found.local_shards(), wanted.local_shards(), strict=True)
        for one, other in pairs:
            assert one.metadata.shard_offsets == other.metadata.shard_offsets, where
            _assert_same_tensor(one.tensor, other.tensor, where)
    elif isinstance(wanted, DTensor):
        assert isinstance(found, DTensor), where
        assert found.placements == wanted.placements, where
        _assert_same_tensor(found.to_local(), wanted.to_local(), where)
    else:
        assert torch.equal(_bits(found), _bits(wanted)), f"{where}: values differ"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as bytes, so that NaNs and negative zeros are compared."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.contiguous().reshape(-1).view(torch.uint8)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress DCP's warnings about a missing process group and an existing checkpoint."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is ")
        warnings.filterwarnings("ignore", message="Detected an existing checkpoint")
        yield
