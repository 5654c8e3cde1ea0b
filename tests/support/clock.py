"""A clock that a test moves."""

from __future__ import annotations

import time
from types import ModuleType

import pytest


class FakeClock:
    """Moves by ``advance`` and ``sleep`` alone; a module can have it instead of ``time``."""

    CLOCK_BOOTTIME = time.CLOCK_BOOTTIME
    BOOTED_AT = 1000.0

    def __init__(self, now: float = BOOTED_AT) -> None:
        self.now = now

    def replace_in(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> FakeClock:
        """Let ``modules`` see this clock as ``time``."""
        for module in modules:
            monkeypatch.setattr(module, "time", self)
        return self

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    sleep = advance

    def time(self) -> float:
        return self.now

    monotonic = perf_counter = time

    def clock_gettime(self, clock: int) -> float:
        """Seconds since the machine started."""
        assert clock == self.CLOCK_BOOTTIME
        return self.now - self.BOOTED_AT
