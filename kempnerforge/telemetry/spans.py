"""Time the parts of a step, with the clock of the host or of the device.

CUDA work is queued, and the host's clock would time only the queueing. On CUDA a span therefore
records two events on the current stream. ``collect`` resolves them after the step's own
synchronization (the copy of the loss to the host), so that timing adds no synchronization.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Spans:
    """Timers of a step, by name. Times of the same name are added. Spans may be nested.

    Args:
        device_type: ``"cuda"`` times on the device, any other type on the host.
        on_enter: called with the name of every span that starts.
    """

    def __init__(self, device_type: str, *, on_enter: Callable[[str], None] = lambda _name: None) -> None:
        self._on_enter = on_enter
        self._device = _CudaEvents() if device_type == "cuda" else None
        self._host_s: dict[str, float] = {}

    @contextmanager
    def span(self, name: str, *, host: bool = False) -> Iterator[None]:
        """Time the body as ``time/<name>_s``.

        Args:
            name: name of the span, such as ``forward_backward``.
            host: use the host's clock even on CUDA, for work without the device, such as waiting
                for data, or for a whole step that ends in a synchronization.
        """
        self._on_enter(name)
        if self._device is not None and not host:
            with self._device.span(name):
                yield
            return
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self._host_s[name] = self._host_s.get(name, 0.0) + time.perf_counter() - start_s

    def collect(self) -> dict[str, float]:
        """Return the seconds since the last ``collect`` as ``time/<name>_s``, and reset all timers.

        On CUDA this waits for the end of the last span, which has been reached if the step has
        synchronized.
        """
        seconds = self._host_s
        self._host_s = {}
        if self._device is not None:
            seconds = seconds | self._device.collect()
        return {f"time/{name}_s": value for name, value in seconds.items()}


class _CudaEvents:
    """Pairs of timing events on the current stream. Events are reused: creating one is a driver call."""

    def __init__(self) -> None:
        import torch

        self._new_event = lambda: torch.cuda.Event(enable_timing=True)
        self._free: list[Any] = []
        self._pairs: list[tuple[str, Any, Any]] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = self._record()
        try:
            yield
        finally:
            self._pairs.append((name, start, self._record()))

    def collect(self) -> dict[str, float]:
        seconds: dict[str, float] = {}
        for name, start, end in self._pairs:
            end.synchronize()
            seconds[name] = seconds.get(name, 0.0) + start.elapsed_time(end) / 1000.0  # milliseconds
            self._free += (start, end)
        self._pairs.clear()
        return seconds

    def _record(self) -> Any:
        event = self._free.pop() if self._free else self._new_event()
        event.record()
        return event
