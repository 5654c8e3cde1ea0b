"""Copying a step's tensors into the arenas, as the mode says, so that the snapshot is of exactly one step."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from kempnerforge.checkpoint import cuda
from kempnerforge.errors import SaveFailedError

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""(target in an arena, source on any device)."""


GROUP_BYTES = 64 << 20
"""Bytes that are copied from a device between two checks of its progress."""


class Staging(Protocol):
    """One copy, of pairs in their order. The writer follows it: it need not wait for the last byte."""

    def start(self) -> None:
        """Begin. ``finish`` raises what failed; an interrupt (Ctrl-C) is raised here too."""
        ...

    def fail(self, error: BaseException) -> None:
        """End a copy that was not started, so that nobody waits for it; ``finish`` raises ``error``."""
        ...

    def copied(self) -> int:
        """Number of pairs that are completely copied. Any thread. Raises what the copy raised."""
        ...

    def before_mutation(self) -> None:
        """Return when the sources may be modified by what the caller does next."""
        ...

    def finish(self) -> None:
        """Block until every byte is in the arena. Any thread. Raises what the copy raised."""
        ...

    def wait_until_idle(self) -> None:
        """Return when nothing writes into the arena any more, also after an error. Any thread.

        Before that the arena may be neither filled again nor released. Waits for ``start`` or ``fail``.
        Raises nothing.
        """
        ...


class Versions:
    """Notices tensors that are modified in place while they are copied: the snapshot would be of two steps.

    By the count that autograd keeps for each tensor. Writes through ``.data``, and kernels that do not count,
    fused optimizers say, are not noticed.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._known: list[tuple[str, torch.Tensor, int]] = []
        for name, tensor in tensors.items():
            sharded = isinstance(tensor, ShardedTensor)
            for part in [shard.tensor for shard in tensor.local_shards()] if sharded else [tensor]:
                if not part.is_inference():
                    self._known.append((name, part, part._version))

    def check(self) -> None:
        """Raise SaveFailedError, naming it, when a tensor was modified since. Then nothing is remembered."""
        known, self._known = self._known, []
        for name, tensor, version in known:
            if tensor._version != version:
                raise SaveFailedError(
                    f"{name} was modified while it was being copied: call wait_for_staging() before whatever "
                    "modifies it"
                )


class BlockingCopy:
    """Copies on the calling thread, on the current stream: ``start`` returns when it is done."""

    def __init__(self, pairs: Pairs, versions: Versions | None = None) -> None:
        self._versions = versions or Versions({})
        self._pairs = pairs
        self._copied = 0
        self._error: BaseException | None = None
        self._ended = threading.Event()

    def start(self) -> None:
        """Copy everything."""
        self._copy()

    def _copy(self) -> None:
        try:
            for group in _groups(self._pairs):
                for target, source in group:
                    target.copy_(source, non_blocking=True)
                if (device := group[0][1].device).type == "cuda":
                    torch.cuda.current_stream(device).synchronize()
                self._copied += len(group)
            self._versions.check()
        except BaseException as error:
            self._error = error
            for device in {source.device for _, source in self._pairs if source.is_cuda}:
                cuda.finish_stream(None, device)  # copies that are queued would write into released buffers
            if not isinstance(error, Exception):  # an interrupt ends the program, not the save alone
                raise
        finally:
            self._pairs = ()  # the sources are not kept alive until the next save
            self._ended.set()

    def fail(self, error: BaseException) -> None:
        """End a copy that was not started."""
        if not self._ended.is_set():
            self._error = error
            self._pairs = ()
            self._ended.set()

    def copied(self) -> int:
        """Pairs that are copied."""
        if self._error is not None:
            raise self._error
        return self._copied

    def before_mutation(self) -> None:
        """Everything is copied already."""
        self._ended.wait()

    def finish(self) -> None:
        """Wait for the end."""
        self._ended.wait()
        self.copied()

    def wait_until_idle(self) -> None:
        """Wait for the end. Whoever copies has waited for the device."""
        self._ended.wait()


class ThreadCopy(BlockingCopy):
    """Copies on a thread beside the next forward and backward, where there is no CUDA."""

    def start(self) -> None:
        """Start the thread."""
        try:
            threading.Thread(target=self._copy, name="checkpoint-staging", daemon=True).start()
        except RuntimeError as error:  # no more threads
            self.fail(error)


class FailedCopy:
    """A copy that could not begin. ``finish`` raises the reason, as for a copy that failed."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def start(self) -> None:
        """There is nothing to copy."""

    def fail(self, error: BaseException) -> None:
        """It has failed already."""

    def copied(self) -> int:
        """Raise the reason."""
        raise self._error

    def before_mutation(self) -> None:
        """Nothing reads the sources."""

    def finish(self) -> None:
        """Raise the reason."""
        raise self._error

    def wait_until_idle(self) -> None:
        """Nothing was copied."""


class StreamCopy:
    """CUDA to pinned memory on a side stream, beside the next forward and backward.

    The side stream first waits for the compute stream, so that it never reads what a queued optimizer kernel
    has still to write; and the compute stream waits for the copies before the next optimizer step, on the
    device, so that the host waits for nothing.
    """

    _streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}

    def __init__(self, pairs: Pairs, device: torch.device, versions: Versions | None = None) -> None:
        self._versions = versions or Versions({})
        self._pairs = pairs
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._events: list[tuple[int, torch.cuda.Event]] = []
        self._passed = 0
        self._error: BaseException | None = None
        self._queued = threading.Event()

    def start(self) -> None:
        """Queue the copies."""
        try:
            self._queue()
        except BaseException as error:
            self._error = error
            if not isinstance(error, Exception):
                raise
        finally:
            self._queued.set()

    def fail(self, error: BaseException) -> None:
        """End a copy that was not started."""
        if not self._queued.is_set():
            self._error = error
            self._queued.set()

    def _queue(self) -> None:
        if self._device not in self._streams:
            self._streams[self._device] = torch.cuda.Stream(self._device)
        stream, copied = self._streams[self._device], 0
        self._stream = stream
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for group in _groups(self._pairs):
                for target, source in group:
                    target.copy_(source, non_blocking=True)
                copied += len(group)
                event = torch.cuda.Event()
                event.record(stream)
                self._events.append((copied, event))

    def copied(self) -> int:
        """Pairs whose copies the device has done."""
        if not self._queued.is_set():
            return 0
        if self._error is not None:
            raise self._error
        while self._passed < len(self._events) and self._events[self._passed][1].query():
            self._passed += 1
        return self._events[self._passed - 1][0] if self._passed else 0

    def before_mutation(self) -> None:
        """Queue the wait on the compute stream."""
        self._check_versions()
        if self._events:
            torch.cuda.current_stream(self._device).wait_event(self._events[-1][1])

    def _check_versions(self) -> None:
        """What was queued before the first call of either kind may have modified a source."""
        try:
            self._versions.check()
        except SaveFailedError as error:
            self._error = error

    def finish(self) -> None:
        """Wait for the device."""
        self._queued.wait()
        self._check_versions()
        if self._error is not None:
            raise self._error
        if self._events:
            self._events[-1][1].synchronize()
        self._pairs = ()  # until now the sources had to stay: the side stream was reading them

    def wait_until_idle(self) -> None:
        """Wait for all that was queued. Of a copy that failed the last part has no event."""
        self._queued.wait()
        if self._stream is not None:
            cuda.finish_stream(self._stream, self._device)
        self._pairs = ()


def overlapping(pairs: Pairs, tensors: Mapping[str, torch.Tensor]) -> Staging:
    """Return a copy that overlaps with the next forward and backward. ``tensors``: the sources, by name."""
    devices = {source.device for _, source in pairs if source.is_cuda}
    assert len(devices) <= 1  # ``cuda.device_of`` has refused others: a side stream belongs to one
    versions = Versions(tensors)
    return StreamCopy(pairs, devices.pop(), versions) if devices else ThreadCopy(pairs, versions)


def _groups(pairs: Pairs) -> Iterator[Pairs]:
    """``pairs`` in runs on one device: one by one on the host, ``GROUP_BYTES`` together on a GPU."""
    begin, size_bytes = 0, 0
    for place, (target, source) in enumerate(pairs):
        size_bytes += target.nbytes
        is_last = place == len(pairs) - 1 or pairs[place + 1][1].device != source.device
        if is_last or not source.is_cuda or size_bytes >= GROUP_BYTES:
            yield pairs[begin : place + 1]
            begin, size_bytes = place + 1, 0
