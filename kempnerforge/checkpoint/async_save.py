"""``AsyncCheckpointer``: stages, writes and commits a state dict, blocking or in the background."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
import torch.distributed as dist

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.manifest import Provenance
from kempnerforge.checkpoint.results import Payload
from kempnerforge.checkpoint.save import pipeline
from kempnerforge.checkpoint.save.handle import SaveHandle, SaveHistory
from kempnerforge.checkpoint.save.host_buffers import HostBuffers
from kempnerforge.checkpoint.save.pipeline import (
    RankSave,
    RetryPolicy,
    SaveJob,
    SaveRequest,
    SaveResult,
)
from kempnerforge.checkpoint.save.plan import SavePlanCache
from kempnerforge.checkpoint.save.staging import BlockingCopy, FailedCopy, Staging, overlapping
from kempnerforge.checkpoint.save.writer_client import Writer
from kempnerforge.checkpoint.state.flatten import payload_of
from kempnerforge.config.schema import AsyncCheckpointMode
from kempnerforge.distributed import timeouts
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.distributed.store_channel import LocalBoard, StoreBoard, StoreChannel
from kempnerforge.errors import CheckpointError
from kempnerforge.torch_compat import get_default_store  # pyright: ignore[reportPrivateUsage]

StateDict = Mapping[Any, Any] | Callable[[], Payload]
"""A state dict, whose keys become text, or a function that returns the payload of a save."""


class AsyncCheckpointer:
    """Saves any DCP-compatible state dict as a committed checkpoint of format 1.

    ``save`` returns after the commit (``disabled``) or after the copy to host buffers (other
    modes). To overlap the copy with compute as well, use ``async_pinned`` with ``begin_save`` and
    ``wait_for_staging``. That mode copies on a side stream, or, without CUDA, on a thread.

    The first save allocates the host buffers, one for the bytes of each file that this rank writes.
    They are pinned if the tensors are on a CUDA device. The tensors of one process must be on one
    device. Later saves reuse the buffers. A separate process writes the files from them. A save
    first waits for the one before it.

    As a context manager, it finishes a pending save at the end, raises SaveFailedError if that
    failed, and closes. If an exception ends the ``with``, or the interpreter exits without
    ``close``, it finishes the save too, and prints a failure to standard error.

    Args:
        mode: the member or its value, such as ``"async"``. Raises ValueError for anything else.
        patience: how often a write is tried, and how long ranks wait for each other.
        stall_timeout_s: replace the writer, and repeat its write, after this many seconds without
            progress.
        max_host_memory_gb: the most memory that host buffers may take on one machine. None: as much
            as is free there.
    """

    def __init__(
        self,
        mode: AsyncCheckpointMode | str = AsyncCheckpointMode.disabled,
        *,
        patience: RetryPolicy | None = None,
        stall_timeout_s: float = 120.0,
        max_host_memory_gb: float | None = None,
    ) -> None:
        self.mode = _known_mode(mode)
        self._retry = patience or RetryPolicy()
        self._writer = Writer(stall_timeout_s=stall_timeout_s)
        self._process_group: dist.ProcessGroup | None = None
        self._control: ControlGroup | None = None
        self._channel: StoreChannel = LocalBoard()
        # The writer maps buffers that it has seen. It is started again when there is something to write.
        self._plan = SavePlanCache(max_host_memory_gb, on_release=self._writer.close)
        self._history = SaveHistory()
        self._number = 0
        self.last_save: SaveHandle | None = None
        """The newest save; None before the first one, and while ``begin_save`` plans one."""

    def __enter__(self) -> AsyncCheckpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self.close()

    def save(
        self,
        state_dict: StateDict,
        checkpoint_id: str | os.PathLike[str],
        process_group: dist.ProcessGroup | None = None,
        **request: Any,
    ) -> None:
        """Write ``state_dict`` as the folder ``checkpoint_id``, which must not exist.

        Collective: all ranks of ``process_group`` (None: all ranks), which may be a subset.
        Blocks: for the save before this one, then for the commit (``disabled``) or the copy.
        Mutation: tensors may be changed on return.
        Durable: on return with ``disabled``; in other modes after ``wait``.

        Non-tensor leaves become tagged JSON. If several ranks have one, the lowest rank's value is
        stored. Raises TypeError or ValueError on all ranks, naming the leaf, for what a checkpoint
        cannot hold, before anything is written. Raises SaveFailedError on all ranks, with rank and
        cause. In the asynchronous modes ``wait`` or the next ``save`` raises it, once. ``request``
        is passed to ``begin_save``.
        """
        self.begin_save(state_dict, checkpoint_id, process_group, **request).wait_until_staged()
        if self.blocks:
            self.wait()

    @property
    def _pending(self) -> SaveHandle | None:
        """The newest save, unless its outcome has been returned or raised."""
        handle = self.last_save  # read once: another thread may ask for ``in_flight``
        return handle if handle is not None and not handle.is_read else None

    @property
    def is_pending(self) -> bool:
        """Whether the outcome of a save is still unknown to this rank. Never blocks."""
        pending = self._pending
        return pending is not None and not pending.done()

    def poll(self) -> SaveResult | None:
        """Return the outcome of the pending save; None while it is unknown. Never blocks."""
        return self._pending.peek() if self._pending is not None else None

    def wait(self) -> SaveResult | None:
        """Wait until the pending save has ended, and return its outcome; None if none is pending.

        Not collective. Raises SaveFailedError, once, if it failed.
        """
        return self._pending.result() if self._pending is not None else None

    def wait_for_staging(self) -> None:
        """Call before ``optimizer.step()``. Return when the tensors of the pending save may be modified.

        Not collective. Blocks: until the copy is done. On CUDA the device waits, not the host.
        """
        if self._pending is not None:
            self._pending.wait_until_staged()

    def join(self) -> None:
        """Wait for this rank's part of a pending save, without raising. Not collective."""
        if self._pending is not None:
            self._pending.join()

    @property
    def blocks(self) -> bool:
        """Whether ``save`` returns only after the commit."""
        return self.mode is AsyncCheckpointMode.disabled

    @property
    def host_bytes(self) -> int:
        """Host memory that this rank's buffers take."""
        return self._plan.buffers.size_bytes if self._plan.buffers is not None else 0

    @property
    def save_bytes(self) -> int:
        """Bytes that a save of all ranks writes, once ``prepare`` or a save has run. First rank only."""
        return self._plan.expected.size_bytes if self._plan.expected is not None else 0

    def linkable_bytes(self, step_folder: Path) -> int:
        """Return how many of ``save_bytes`` a save is expected to link to a step. First rank only."""
        expected = self._plan.expected
        if expected is None or self._plan.frozen.refused:
            return 0
        try:
            return expected.linkable_bytes(step_folder)
        except (CheckpointError, OSError):
            return 0

    def link_to(self, step_folder: Path) -> None:
        """Let the next save link files of frozen tensors to those of a committed step that are equal."""
        self._plan.frozen.step_folder = step_folder

    @property
    def num_files(self) -> int:
        """Shard files of a save of all ranks. First rank only."""
        return len(self._plan.expected.files) if self._plan.expected is not None else 0

    @property
    def in_flight(self) -> tuple[str, str, float] | None:
        """Name, progress of this rank and age in seconds of the pending save. Any thread."""
        pending = self._pending
        if pending is None:
            return None
        return pending.name, pending.progress.doing, time.perf_counter() - pending.started

    @property
    def writer_pid(self) -> int | None:
        """Id of the writer process, while there is one."""
        return self._writer.pid

    @torch.inference_mode(False)  # the buffers outlive an inference mode of the caller
    def prepare(
        self,
        state_dict: StateDict,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Plan the saves and make the buffers now, so that the first save takes no longer than later ones.

        Collective: all ranks of ``process_group``. Blocks: for a pending save, which writes from
        the buffers. Raises what ``begin_save`` raises, on all ranks.
        """
        self.wait()
        self._plan_save(self._join_group(process_group), state_dict)

    @torch.inference_mode(False)
    def begin_save(
        self,
        state_dict: StateDict,
        checkpoint_id: str | os.PathLike[str],
        process_group: dist.ProcessGroup | None = None,
        request: SaveRequest | None = None,
        **fields: Any,
    ) -> SaveHandle:
        """Begin a save. Call ``wait_until_staged`` of the handle before any tensor is modified.

        Collective: all ranks of ``process_group``, which must be the same at every save.
        Blocks: for the save before this one; for the copy, unless the mode is ``async_pinned``.
        Mutation: do not modify tensors before ``wait_until_staged`` returns.
        Durable: not on return; ``result`` of the handle waits for it.

        ``state_dict`` may be a function that returns the payload. Its error on one rank is raised
        on all. ``fields`` are fields of ``SaveRequest`` and replace those of ``request``. Raises
        TypeError, ValueError and SaveFailedError on all ranks, before anything is staged. A later
        failure on one rank, such as that the folder exists, fails the save on all ranks.
        """
        request = replace(request or SaveRequest(), **fields)
        if request.provenance is None:  # pyright: ignore[reportUnnecessaryComparison]
            request = replace(request, provenance=Provenance())
        self.wait()
        started = time.perf_counter()
        control = self._join_group(process_group)
        final = paths.local_path(checkpoint_id)
        temporary = final.with_name(paths.temporary_name(final.name, request.provenance.attempt))
        self.last_save = None
        payload = self._plan_save(control, state_dict)
        buffers = self._plan.buffers
        assert buffers is not None
        objects = self._plan.objects(payload)
        self._number += 1
        job = SaveJob(
            number=self._number,
            rank=control.rank,
            num_ranks=control.num_ranks,
            final=final,
            temporary=temporary,
            request=request,
            objects=objects,
            staging=self._stage(buffers, payload.tensors),
            buffers=buffers,
            largest_bytes=self._plan.largest_bytes,
            expected=self._plan.expected,
            contributed={name: objects[name] for name in self._plan.contributed},
            frozen_files=self._plan.frozen,
            frozen=self._plan.frozen.begin(self._plan.files, payload.tensors),
            retry=self._retry,
            device=self._plan.device,
            timeout_s=self._timeout_s(),
            failed_before=self._history.failed,
            started=started,
        )
        self._history.failed = None
        self._writer.set_priority(urgent=self.blocks)
        save = RankSave(job, self._writer, self._channel)
        try:
            self.last_save = handle = SaveHandle(save, self._history)
            save.start()
            job.staging.start()
        except BaseException as error:  # Ctrl-C: else the thread would wait for a copy that never starts
            job.staging.fail(error)
            raise
        return handle

    def _plan_save(self, control: ControlGroup, state_dict: StateDict) -> Payload:
        """Plan the save and return what this rank saves.

        Collective: all ranks. An error of one rank is raised on all.
        """
        payload = Payload({})
        error: Exception | None = None
        try:
            payload = _payload(state_dict)
            self._plan.update(payload)
        except Exception as cause:  # noqa: BLE001 - raised on all ranks below
            error = cause
        self._plan.agree(control, error, same=payload.same_on_all_ranks)
        return payload

    def _timeout_s(self) -> float:
        """Return the seconds after which the next save fails. The same on all ranks."""
        if self._retry.save_timeout_s is not None:
            return self._retry.save_timeout_s
        return pipeline.automatic_timeout_s(self._plan.largest_bytes, self._history.rates)

    def close(self) -> None:
        """Finish a pending save without raising, end the writer, release the buffers. Not collective.

        A failure that ``wait`` has not raised is printed to standard error.
        """
        if self._pending is not None:
            self._pending.close()
        if self._history.failed is not None:
            shutil.rmtree(self._history.failed.temporary, ignore_errors=True)
            self._history.failed = None
        self._writer.close()
        self._plan.release()

    def _join_group(self, process_group: dist.ProcessGroup | None) -> ControlGroup:
        """Return the group that agrees on saves. The first call creates it and its channel. Collective."""
        if self._control is not None and process_group is not self._process_group:
            raise ValueError("process_group must be the same at every save: use another AsyncCheckpointer")
        if self._control is None:
            self._process_group = process_group
            group = process_group
            if group is None and dist.is_initialized():
                group = _gloo_group(None)
            elif group is not None and torch.device("cpu") not in group._device_types:
                group = _gloo_group(group)  # NCCL cannot reduce host tensors
            control = ControlGroup(group)
            if group is not None:
                prefix = control.run_on_rank0(lambda: secrets.token_hex(8), brief=True)
                self._channel = StoreBoard(get_default_store(), prefix)
            self._control = control
        return self._control

    def _stage(self, buffers: HostBuffers, tensors: Mapping[str, torch.Tensor]) -> Staging:
        """Return the copy of this save. Must not raise, because the other ranks continue with the save."""
        try:
            pairs = buffers.pairs(tensors)
            overlaps = self.mode is AsyncCheckpointMode.async_pinned
            return overlapping(pairs, tensors) if overlaps else BlockingCopy(pairs)
        except Exception as error:  # noqa: BLE001 - raised by the copy
            return FailedCopy(error)


def _payload(state: StateDict) -> Payload:
    if not isinstance(state, Mapping) and not callable(state):
        raise TypeError(f"a state dict is a mapping from names to values, not {type(state).__name__}")
    return payload_of(cast("Mapping[Any, Any]", state)) if isinstance(state, Mapping) else state()


def _gloo_group(of: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return a new gloo group with the ranks and the time-out of ``of``. None: all ranks.

    Only the ranks of the group call this.
    """
    group = dist.new_group(  # pyright: ignore[reportUnknownMemberType]
        dist.get_process_group_ranks(of) if of is not None else None,
        timeout=timeouts.timeout_of(of),
        backend="gloo",
        use_local_synchronization=of is not None,
    )
    assert isinstance(group, dist.ProcessGroup)
    return group


def _known_mode(mode: AsyncCheckpointMode | str) -> AsyncCheckpointMode:
    try:
        return AsyncCheckpointMode(mode)
    except ValueError:
        known = ", ".join(f'"{member.value}"' for member in AsyncCheckpointMode)
        raise ValueError(f"async_mode: {mode!r} is not one of {known}") from None
