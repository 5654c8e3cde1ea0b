"""How long the parts of a step take, on the host's clock or on the device's.

CUDA work is queued: the host's clock would time the queueing. There a span records two events on
the current stream and reads no clock; ``collect`` resolves them all after the step's own synchronisation (the
loss has reached the host), so that timing adds no synchronisation of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Spans:
    """Timers of one step, by name. A name used several times in a step adds up; spans may nest.

    Args:
        device_type: ``"cuda"`` times on the device; anything else on the host.
        on_enter: told the name of every span that begins.
    """

    def __init__(self, device_type: str, *, on_enter: Callable[[str], None] = lambda _name: None) -> None:
        self._on_enter = on_enter
        self._device = _CudaEvents() if device_type == "cuda" else None
        self._host_s: dict[str, float] = {}

    @contextmanager
    def span(self, name: str, *, host: bool = False) -> Iterator[None]:
        """Time the body as ``time/<name>_s``.

        Args:
            name: such as ``forward_backward``.
            host: use the host's clock on CUDA too, for what the device takes no part in: waiting for data,
                or a whole step that ends in a synchronisation.
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
        """The seconds since the last ``collect``, as ``time/<name>_s``; starts the next step at nothing.

        On CUDA this waits for the last span to have run, which it has if the step has synchronised.
        """
        seconds = self._host_s
        self._host_s = {}
        if self._device is not None:
            seconds = seconds | self._device.collect()
        return {f"time/{name}_s": value for name, value in seconds.items()}


class _CudaEvents:
    """Pairs of timing events on the current stream. Events are used again: making one costs a driver call."""

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
            seconds[name] = seconds.get(name, 0.0) + start.elapsed_time(end) / 1000.0  # given in ms
            self._free += (start, end)
        self._pairs.clear()
        return seconds

    def _record(self) -> Any:
        event = self._free.pop() if self._free else self._new_event()
        event.record()
        return event
