"""Arms that save the same state: ours, and stock DCP, used as in its tutorials."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.config.schema import AsyncCheckpointMode


class Saver(Protocol):
    """Saves one state repeatedly."""

    def begin(self, path: Path) -> None:
        """Begin a save. A blocking arm returns when the save is durable."""
        ...

    def before_update(self) -> None:
        """Return when tensors may change."""
        ...

    def done(self) -> bool:
        """Whether the save is committed. Never blocks."""
        ...

    def wait(self) -> None:
        """Return when the save is committed."""
        ...

    def pid(self) -> int | None:
        """Return the writer process, or None."""
        ...

    def close(self) -> None:
        """Release all resources."""
        ...


class Ours:
    """``AsyncCheckpointer``."""

    def __init__(self, model: nn.Module, optimizer: Any, mode: AsyncCheckpointMode) -> None:
        self._state = TrainState(model=model, optimizer=optimizer)
        self._checkpointer = AsyncCheckpointer(mode)

    def begin(self, path: Path) -> None:
        """Begin a save, and in the blocking mode wait for it."""
        self._checkpointer.begin_save(self._state.capture, path)
        if self._checkpointer.blocks:
            self._checkpointer.wait()

    def before_update(self) -> None:
        """Wait for the copy."""
        self._checkpointer.wait_for_staging()

    def done(self) -> bool:
        """Whether the save is committed."""
        return not self._checkpointer.is_pending

    def wait(self) -> None:
        """Wait until the save is committed."""
        self._checkpointer.wait()

    def pid(self) -> int | None:
        """Return the writer process."""
        return self._checkpointer.writer_pid

    def close(self) -> None:
        """End the writer."""
        self._checkpointer.close()

    @property
    def host_bytes(self) -> int:
        """Size of this rank's buffers."""
        return self._checkpointer.host_bytes


class StockAsync:
    """``dcp.async_save`` with its defaults (a thread, new buffers for each save) and its own gloo group."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self._parts = model, optimizer
        self._group = dist.new_group(backend="gloo")
        self._future: Future[object] | None = None

    def begin(self, path: Path) -> None:
        """Begin a save. Returns after the copy."""
        weights, moments = get_state_dict(*self._parts)
        assert isinstance(self._group, dist.ProcessGroup)
        future = async_save(
            {"model": weights, "optimizer": moments}, checkpoint_id=path, process_group=self._group
        )
        assert isinstance(future, Future)
        self._future = future

    def before_update(self) -> None:
        """Do nothing: the copy was synchronous."""

    def done(self) -> bool:
        """Whether ``.metadata`` is written."""
        return self._future is None or self._future.done()

    def wait(self) -> None:
        """Wait until ``.metadata`` is written."""
        if self._future is not None:
            self._future.result()

    def pid(self) -> int | None:
        """Return None: it writes in this process."""
        return None

    def close(self) -> None:
        """Do nothing: no resources are held."""


class StockBlocking:
    """``dcp.save`` to files that it syncs, which is its default."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self._parts = model, optimizer

    def begin(self, path: Path) -> None:
        """Save and return when it is durable."""
        weights, moments = get_state_dict(*self._parts)
        writer = FileSystemWriter(path, sync_files=True)
        save({"model": weights, "optimizer": moments}, storage_writer=writer)

    def before_update(self) -> None:
        """Do nothing: ``begin`` blocks."""

    def done(self) -> bool:
        """Return True: ``begin`` blocks."""
        return True

    def wait(self) -> None:
        """Do nothing: ``begin`` blocks."""

    def pid(self) -> int | None:
        """Return None: it writes in this process."""
        return None

    def close(self) -> None:
        """Do nothing: no resources are held."""
