"""Copy the tensors of one step into the host buffers: blocking, on a thread, or on a CUDA stream."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Protocol

import torch

from kempnerforge.checkpoint import cuda
from kempnerforge.errors import SaveFailedError
from kempnerforge.torch_compat import ShardedTensor

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""(target in a host buffer, source on any device)."""


GROUP_BYTES = 64 << 20
"""Bytes that are copied from a device between two checks of its progress."""


class Staging(Protocol):
    """A copy of pairs, in their order. The writer writes the copied part while the rest is being copied."""

    def start(self) -> None:
        """Begin. ``finish`` raises an error of the copy. An interrupt (Ctrl-C) is raised here too."""
        ...

    def fail(self, error: BaseException) -> None:
        """End a copy that was not started, so that nothing waits for it. ``finish`` raises ``error``."""
        ...

    def copied(self) -> int:
        """Return how many pairs are completely copied. Any thread. Raises what the copy raised."""
        ...

    def before_mutation(self) -> None:
        """Return when the caller may modify the sources."""
        ...

    def finish(self) -> None:
        """Block until every byte is copied. Any thread. Raises what the copy raised."""
        ...

    def wait_until_idle(self) -> None:
        """Return when nothing writes to the host buffers any more, also after an error. Any thread.

        Until then the buffers may be neither reused nor released. Waits for ``start`` or ``fail``.
        Raises nothing.
        """
        ...


class Versions:
    """Detects tensors that are modified in place during the copy, which would then mix two steps.

    Uses the version counter that autograd keeps for each tensor. It misses writes through ``.data``
    and kernels that do not increment the counter, such as fused optimizers.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._before: list[tuple[str, torch.Tensor, int]] = []
        for name, tensor in tensors.items():
            sharded = isinstance(tensor, ShardedTensor)
            for part in [shard.tensor for shard in tensor.local_shards()] if sharded else [tensor]:
                if not part.is_inference():
                    self._before.append((name, part, part._version))

    def check(self) -> None:
        """Raise SaveFailedError, naming the tensor, if one was modified. Later calls do nothing."""
        before, self._before = self._before, []
        for name, tensor, version in before:
            if tensor._version != version:
                raise SaveFailedError(
                    f"{name} was modified while it was being copied: call wait_for_staging() before the code "
                    "that modifies it"
                )


class BlockingCopy:
    """Copies on the calling thread and the current stream. ``start`` returns when the copy is done."""

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
                cuda.finish_stream(None, device)  # queued copies would write to released buffers
            if not isinstance(error, Exception):  # an interrupt must end the program, not only the save
                raise
        finally:
            self._pairs = ()  # do not keep the sources alive until the next save
            self._ended.set()

    def fail(self, error: BaseException) -> None:
        """End a copy that was not started."""
        if not self._ended.is_set():
            self._error = error
            self._pairs = ()
            self._ended.set()

    def copied(self) -> int:
        """Return how many pairs are copied."""
        if self._error is not None:
            raise self._error
        return self._copied

    def before_mutation(self) -> None:
        """Wait for the end: the copy reads the sources until then."""
        self._ended.wait()

    def finish(self) -> None:
        """Wait for the end."""
        self._ended.wait()
        self.copied()

    def wait_until_idle(self) -> None:
        """Wait for the end. The copying thread has waited for the device."""
        self._ended.wait()


class ThreadCopy(BlockingCopy):
    """Copies on a thread during the next forward and backward, where there is no CUDA."""

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
        """Do nothing: there is nothing to copy."""

    def fail(self, error: BaseException) -> None:
        """Do nothing: the copy has failed already."""

    def copied(self) -> int:
        """Raise the reason."""
        raise self._error

    def before_mutation(self) -> None:
        """Return at once: nothing reads the sources."""

    def finish(self) -> None:
        """Raise the reason."""
        raise self._error

    def wait_until_idle(self) -> None:
        """Return at once: nothing was copied."""


class StreamCopy:
    """Copies from CUDA to pinned memory on a side stream, during the next forward and backward.

    The side stream first waits for the compute stream, so that it never reads a tensor that a
    queued optimizer kernel has yet to write. The compute stream waits for the copies before the
    next optimizer step. Both waits are on the device: the host does not wait.
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
        """Return how many pairs the device has copied."""
        if not self._queued.is_set():
            return 0
        if self._error is not None:
            raise self._error
        while self._passed < len(self._events) and self._events[self._passed][1].query():
            self._passed += 1
        return self._events[self._passed - 1][0] if self._passed else 0

    def before_mutation(self) -> None:
        """Queue the wait for the copies on the compute stream."""
        self._check_versions()
        if self._events:
            torch.cuda.current_stream(self._device).wait_event(self._events[-1][1])

    def _check_versions(self) -> None:
        """Check at the first ``before_mutation`` or ``finish``: code before it may have modified a source."""
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
        self._pairs = ()  # the side stream no longer reads the sources

    def wait_until_idle(self) -> None:
        """Wait for all queued copies. A copy that failed may have queued some without an event."""
        self._queued.wait()
        if self._stream is not None:
            cuda.finish_stream(self._stream, self._device)
        self._pairs = ()


def overlapping(pairs: Pairs, tensors: Mapping[str, torch.Tensor]) -> Staging:
    """Return a copy that overlaps the next forward and backward. ``tensors``: the sources, by name."""
    devices = {source.device for _, source in pairs if source.is_cuda}
    assert len(devices) <= 1  # ``cuda.device_of`` has refused more: a side stream belongs to one device
    versions = Versions(tensors)
    return StreamCopy(pairs, devices.pop(), versions) if devices else ThreadCopy(pairs, versions)


def _groups(pairs: Pairs) -> Iterator[Pairs]:
    """Split ``pairs`` into groups on one device: single pairs on the host, ``GROUP_BYTES`` on a GPU."""
    begin, size_bytes = 0, 0
    for index, (target, source) in enumerate(pairs):
        size_bytes += target.nbytes
        is_last = index == len(pairs) - 1 or pairs[index + 1][1].device != source.device
        if is_last or not source.is_cuda or size_bytes >= GROUP_BYTES:
            yield pairs[begin : index + 1]
            begin, size_bytes = index + 1, 0
