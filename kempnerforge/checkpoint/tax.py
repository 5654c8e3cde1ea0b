"""What checkpoints cost the loop."""

from __future__ import annotations

import time


class StepClock:
    """Share of the time since the loop began that it stood still for checkpoints."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self._started = time.perf_counter()
        self._saved = self._started
        self._blocked_s = 0.0

    def blocked(self, seconds: float) -> None:
        """Add time that the loop waited."""
        self._blocked_s += seconds

    def saved(self) -> None:
        """A save begins now."""
        self._saved = time.perf_counter()

    @property
    def since_save_s(self) -> float:
        """Seconds since the last save began, or since the loop did."""
        return time.perf_counter() - self._saved

    @property
    def overhead_pct(self) -> float:
        """Percent of the time so far."""
        return 100 * self._blocked_s / max(time.perf_counter() - self._started, 1e-9)
