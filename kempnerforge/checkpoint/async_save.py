"""``AsyncCheckpointer``: stage, write, commit, in the way that its mode says."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from kempnerforge.checkpoint import background, layout
from kempnerforge.checkpoint.agreed_plan import AgreedPlan
from kempnerforge.checkpoint.arena import ArenaSet
from kempnerforge.checkpoint.background import FailedSave, Part, Patience, SaveJob, SaveResult, result_key
from kempnerforge.checkpoint.board import Board, LocalBoard, StoreBoard
from kempnerforge.checkpoint.commit import Contents, make_temporary
from kempnerforge.checkpoint.manifest import Provenance
from kempnerforge.checkpoint.report import Payload
from kempnerforge.checkpoint.staging import BlockingCopy, FailedCopy, Staging, overlapping
from kempnerforge.checkpoint.tensor_leaves import Packer
from kempnerforge.checkpoint.tree import payload_of
from kempnerforge.checkpoint.writer import Writer
from kempnerforge.config.schema import AsyncCheckpointMode
from kempnerforge.distributed.control import ControlGroup
from kempnerforge.errors import SaveFailedError

StateDict = Mapping[Any, Any] | Callable[[], Payload]
"""A state dict, whose keys become text, or what makes the payload of a save."""


@dataclass
class _Pending:
    number: int
    name: str
    job: SaveJob
    thread: threading.Thread | None
    result: SaveResult | None = None


_unreported: dict[Part, Path] = {}
"""Saves of this process whose outcome nobody has been told, and where they go. It keeps no buffers alive."""


@atexit.register
def _report_failures() -> None:
    """Say which saves failed at the end of a script: Python has waited for their threads."""
    for part in list(_unreported):
        _report_failure(part)


def _report_failure(part: Part) -> None:
    """Say on standard error that a save failed if nobody has been told. First rank only."""
    final = _unreported.pop(part, None)
    if final is not None and part.result is not None and part.result.error:
        print(f"kempnerforge: {final} was not saved: {part.result.error}", file=sys.stderr)


class AsyncCheckpointer:
    """Saves any DCP-compatible state dict as a committed checkpoint of format 1.

    ``save`` returns after the commit (``disabled``) or after the copy to host buffers (others). To overlap
    the copy with computing as well, use ``async_pinned`` with ``begin_save`` and ``wait_for_staging``: it
    copies to pinned buffers on a side stream, or, without CUDA, to pageable ones on a thread.

    The host buffers, one image of each of this rank's files, are made by the first save and reused by all
    others; a writer process writes from them. One save at a time: the next first waits for the one before.

    A context manager: leaving it finishes a pending save, raises SaveFailedError if that failed, and closes.
    When an exception leaves it, or the interpreter exits without it, the save is finished too and a failure
    is said on standard error.

    Args:
        mode: as above; the member or its value, such as ``"async"``. Raises ValueError for anything else.
        patience: how often a write is tried, and how long ranks wait for each other.
        stall_timeout_s: a writer that makes no progress for so long is replaced, and its write tried again.
    """

    def __init__(
        self,
        mode: AsyncCheckpointMode | str = AsyncCheckpointMode.disabled,
        *,
        patience: Patience | None = None,
        stall_timeout_s: float = 120.0,
    ) -> None:
        self.mode = _known_mode(mode)
        self._patience = patience or Patience()
        self._writer = Writer(stall_timeout_s=stall_timeout_s)
        self._control: ControlGroup | None = None
        self._board: Board = LocalBoard()
        self._plan = AgreedPlan()
        self._number = 0
        self._pending: _Pending | None = None
        self._failed: FailedSave | None = None
        """On the first rank: the save before, if other ranks may still write what it left."""

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
        **contents: Any,
    ) -> None:
        """Write ``state_dict`` as the folder ``checkpoint_id``, which must not exist.

        Collective: all ranks of ``process_group`` (None: all ranks), which may be a subset.
        Blocks: for the save before this one; then until the commit (``disabled``) or the copy (others).
        Mutation: tensors may be changed on return.
        Durable: on return with ``disabled``; else after ``wait``.

        Non-tensor leaves become tagged JSON; of one that several ranks have, the lowest rank's is stored.
        What a checkpoint cannot hold is a TypeError or ValueError on all ranks, which names the leaf, before
        anything is written. SaveFailedError, on all ranks, names the rank and the cause; in the asynchronous
        modes ``wait`` or the next ``save`` raises it, once. ``contents`` is passed to ``begin_save``.
        """
        self.begin_save(state_dict, checkpoint_id, process_group, **contents)
        self.wait_for_staging()
        if self.blocks:
            self.wait()

    @property
    def is_pending(self) -> bool:
        """Whether a save has begun whose outcome this rank does not know yet. Never blocks."""
        return self._pending is not None and self.poll() is None

    def wait(self) -> SaveResult | None:
        """Return when nothing is pending: the last save is committed. Not collective.

        Raises SaveFailedError if it failed.
        """
        pending = self._pending
        if pending is None:
            return None
        self.join()
        deadline, pause_s = time.monotonic() + self._patience.save_timeout_s + 60, 0.001
        while (result := self.poll()) is None:
            if time.monotonic() > deadline:
                raise SaveFailedError(f"{pending.name}: the first rank has not said what came of it")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)
        self._pending = None
        _unreported.pop(pending.job.part, None)
        if result.error:
            if pending.job.rank == 0:
                self._failed = FailedSave.of(pending.job)
            raise SaveFailedError(f"{pending.name} was not saved: {result.error}")
        return result

    @property
    def blocks(self) -> bool:
        """Whether ``save`` returns only after the commit."""
        return self.mode is AsyncCheckpointMode.disabled

    @property
    def host_bytes(self) -> int:
        """Host memory that this rank's buffers take."""
        return self._plan.arenas.size_bytes if self._plan.arenas is not None else 0

    @property
    def save_bytes(self) -> int:
        """Bytes that a save of all ranks writes, known after ``prepare``; on the first rank only."""
        return self._plan.expected.size_bytes if self._plan.expected is not None else 0

    @property
    def num_files(self) -> int:
        """Shard files of a save of all ranks; on the first rank only."""
        return len(self._plan.expected.files) if self._plan.expected is not None else 0

    @property
    def in_flight(self) -> tuple[str, str, float] | None:
        """Name, this rank's part (``background.Part``) and age in seconds of the pending save. Any thread."""
        pending = self._pending
        if pending is None:
            return None
        return pending.name, pending.job.part.doing, time.perf_counter() - pending.job.started

    @property
    def writer_pid(self) -> int | None:
        """The writer process, while there is one."""
        return self._writer.pid

    def prepare(
        self,
        state_dict: StateDict,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Plan and make the buffers now, so that the first save costs what the others do.

        Collective: all ranks of ``process_group``. Raises what ``begin_save`` raises, on all ranks.
        """
        control = self._join(process_group)
        same: Mapping[str, str] = {}
        error = None
        try:
            payload = _payload(state_dict, None)
            same = payload.same_on_all_ranks
            self._plan.look_at(payload)
        except Exception as found:  # noqa: BLE001 - told to all ranks in the agreement below
            error = found
        self._agree(control, error, same)

    def begin_save(
        self,
        state_dict: StateDict,
        checkpoint_id: str | os.PathLike[str],
        process_group: dist.ProcessGroup | None = None,
        *,
        extra_objects: Mapping[str, Any] | None = None,
        provenance: Provenance | None = None,
        config_toml: str = "",
        before_commit: Callable[[], None] = lambda: None,
        after_commit: Callable[[], list[str]] = list,
    ) -> None:
        """Begin to save. ``wait_for_staging`` must stand before the next change of a tensor.

        Collective: all ranks of ``process_group``, which must be the same at every save.
        Blocks: for the save before this one; for the copy, unless the mode is ``async_pinned``.
        Mutation: tensors stay unmodified until ``wait_for_staging`` returns.
        Durable: not on return; see ``poll`` and ``wait``.

        In place of ``state_dict`` a function may be given that makes the payload; what it raises on one rank
        is raised on all. ``extra_objects`` are non-tensor leaves whose nesting is kept. ``before_commit``
        (may raise to forbid it) and ``after_commit`` (returns warnings) run on the first rank's background
        thread. Raises TypeError, ValueError and SaveFailedError on all ranks, before anything is staged. What
        fails on a rank afterwards fails the save on all.
        """
        self.wait()
        control = self._join(process_group)
        provenance = provenance or Provenance()
        final = layout.local_path(checkpoint_id)
        temporary = final.with_name(layout.temporary_name(final.name, provenance.attempt))
        payload = Payload({})
        error: Exception | None = None
        try:
            self._settle_failed()
            payload = _payload(state_dict, extra_objects)
            self._plan.look_at(payload)
            if control.rank == 0:
                make_temporary(final, temporary)
        except Exception as found:  # noqa: BLE001 - told to all ranks in the agreement below
            error = found
        try:
            self._agree(control, error, payload.same_on_all_ranks)
        except BaseException:
            if control.rank == 0 and not isinstance(error, SaveFailedError):
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        arenas = self._plan.arenas
        assert arenas is not None
        objects = self._plan.objects(payload)
        self._number += 1
        job = SaveJob(
            number=self._number,
            rank=control.rank,
            num_ranks=control.num_ranks,
            final=final,
            temporary=temporary,
            contents=Contents(provenance, objects, config_toml),
            staging=self._stage(arenas, payload.tensors),
            arenas=arenas,
            expected=self._plan.expected,
            contributed={name: objects[name] for name in self._plan.contributed},
            before_commit=before_commit,
            after_commit=after_commit,
            patience=self._patience,
        )
        self._writer.hurry(self.blocks)
        thread = background.start(job, self._writer, self._board)
        self._pending = _Pending(job.number, final.name, job, thread)
        _unreported[job.part] = final
        job.staging.start()

    def _settle_failed(self) -> None:
        """Before a path is used again: no rank may still write what a failed save left there."""
        if self._failed is not None:
            self._failed.settle(self._board, timeout_s=self._patience.save_timeout_s)
            self._failed = None

    def wait_for_staging(self) -> None:
        """Return when the tensors of the save that has begun may be changed: before the optimizer step.

        Not collective. Blocks: for what the copy has not finished; on CUDA the device waits, not the host.
        """
        if self._pending is not None:
            self._pending.job.staging.before_mutation()

    def poll(self) -> SaveResult | None:
        """The outcome of the save that has begun; None while it is not known. Never blocks, never raises."""
        pending = self._pending
        if pending is None:
            return None
        if pending.result is None:
            message = self._board.read(result_key(pending.number))
            pending.result = SaveResult(**message) if message is not None else None
        return pending.result

    def join(self) -> None:
        """Let this rank's part of what is pending end, without raising. Not collective."""
        if self._pending is not None:
            self._writer.hurry(True)
            if self._pending.thread is not None:
                self._pending.thread.join()

    def close(self) -> None:
        """Let what is pending end, without raising; end the writer; release the buffers. Not collective.

        A save that failed and whose failure ``wait`` has not raised is named on standard error.
        """
        self.join()
        if self._pending is not None:
            _report_failure(self._pending.job.part)
        self._pending = None
        if self._failed is not None:
            shutil.rmtree(self._failed.temporary, ignore_errors=True)
            self._failed = None
        self._writer.close()
        self._plan.release()

    def _join(self, process_group: dist.ProcessGroup | None) -> ControlGroup:
        """The group that decides and a board of its own, made by the first call."""
        if self._control is None:
            group = process_group
            if group is None and dist.is_initialized():
                made = dist.new_group(backend="gloo")
                assert isinstance(made, dist.ProcessGroup)
                group = made
            control = ControlGroup(group)
            if group is not None:
                prefix = control.on_rank0(lambda: secrets.token_hex(8))
                self._board = StoreBoard(_get_default_store(), prefix)
            self._control = control
        return self._control

    def _agree(self, control: ControlGroup, error: Exception | None, same: Mapping[str, str]) -> None:
        pin = self.mode is AsyncCheckpointMode.async_pinned and torch.cuda.is_available()
        self._plan.agree(control, error, pin=pin, same=same)

    def _stage(self, arenas: ArenaSet, tensors: Mapping[str, torch.Tensor]) -> Staging:
        """The copy of this save. All ranks have agreed on it: what fails now is reported, not raised."""
        try:
            pairs = arenas.pairs(tensors)
            overlaps = self.mode is AsyncCheckpointMode.async_pinned
            return overlapping(pairs) if overlaps else BlockingCopy(pairs)
        except Exception as error:  # noqa: BLE001 - raised by ``finish``
            return FailedCopy(error)


def _payload(state: StateDict, extra_objects: Mapping[str, Any] | None) -> Payload:
    if not isinstance(state, Mapping) and not callable(state):
        raise TypeError(f"a state dict is a mapping from names to values, not {type(state).__name__}")
    payload = payload_of(state) if isinstance(state, Mapping) else state()
    if not extra_objects:
        return payload
    packer = Packer()
    extra = {name: packer.pack(value, name=name) for name, value in extra_objects.items()}
    for name in [*packer.tensors, *extra]:
        if name in payload.tensors or name in payload.objects:
            raise ValueError(f"two leaves are called {name}")
    return replace(
        payload, tensors={**payload.tensors, **packer.tensors}, objects={**payload.objects, **extra}
    )


def _known_mode(mode: AsyncCheckpointMode | str) -> AsyncCheckpointMode:
    try:
        return AsyncCheckpointMode(mode)
    except ValueError:
        known = ", ".join(f'"{member.value}"' for member in AsyncCheckpointMode)
        raise ValueError(f"async_mode: {mode!r} is not one of {known}") from None
