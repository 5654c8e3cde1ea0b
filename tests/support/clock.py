"""A clock that a test controls."""

from __future__ import annotations

import time
from types import ModuleType

import pytest


class FakeClock:
    """A replacement for the module ``time``. Time passes only in ``advance`` and ``sleep``."""

    CLOCK_BOOTTIME = time.CLOCK_BOOTTIME
    BOOTED_AT = 1000.0

    def __init__(self, now: float = BOOTED_AT) -> None:
        self.now = now

    def replace_in(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> FakeClock:
        """Replace ``time`` by this clock in ``modules``."""
        for module in modules:
            monkeypatch.setattr(module, "time", self)
        return self

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self.now += seconds

    sleep = advance

    def time(self) -> float:
        return self.now

    monotonic = perf_counter = time

    def clock_gettime(self, clock: int) -> float:
        """Return the seconds since the machine started."""
        assert clock == self.CLOCK_BOOTTIME
        return self.now - self.BOOTED_AT
