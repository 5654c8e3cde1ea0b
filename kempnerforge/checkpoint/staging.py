"""Copying a step's tensors into the arenas, as the mode says, so that the snapshot is of exactly one step."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""(target in an arena, source on any device)."""


class Staging(Protocol):
    """One copy under way."""

    def before_mutation(self) -> None:
        """Return when, as far as the caller's next work is concerned, the sources may change."""
        ...

    def finish(self) -> None:
        """Block until every byte is in the arena. Any thread. Raises what the copy raised."""
        ...


class BlockingCopy:
    """Copies on the calling thread, on the current stream."""

    def __init__(self, pairs: Pairs) -> None:
        for target, source in pairs:
            target.copy_(source, non_blocking=True)
        if any(source.is_cuda for _, source in pairs):
            torch.cuda.current_stream().synchronize()

    def before_mutation(self) -> None:
        """Everything is copied already."""

    def finish(self) -> None:
        """Everything is copied already."""


class StreamCopy:
    """CUDA to pinned memory on a side stream, beside the next forward and backward.

    The side stream first waits for the compute stream, so that it never reads what a queued optimizer kernel
    has still to write; and the compute stream waits for the copies before the next optimizer step, on the
    device, so that the host waits for nothing.
    """

    _streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}

    def __init__(self, pairs: Pairs, device: torch.device) -> None:
        self._device = device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(stream)

    def before_mutation(self) -> None:
        """Queue the wait on the compute stream."""
        torch.cuda.current_stream(self._device).wait_event(self._copied)

    def finish(self) -> None:
        """Wait for the device."""
        self._copied.synchronize()


class ThreadCopy:
    """Copies on a thread beside the next forward and backward, where there is no CUDA."""

    def __init__(self, pairs: Pairs) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._copy, args=(pairs,), name="checkpoint-staging", daemon=True
        )
        self._thread.start()

    def _copy(self, pairs: Pairs) -> None:
        try:
            for target, source in pairs:
                target.copy_(source)
        except BaseException as error:  # noqa: BLE001 - raised again by ``finish``
            self._error = error

    def before_mutation(self) -> None:
        """Wait for the thread; an error is ``finish``'s to raise."""
        self._thread.join()

    def finish(self) -> None:
        """Wait for the thread."""
        self._thread.join()
        if self._error is not None:
            raise self._error
