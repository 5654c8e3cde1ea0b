"""Decide what follows when all ranks have ended. The functions depend only on their arguments."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass

from kempnerforge.errors import EXIT_BAD_CONFIG, EXIT_FINISHED, EXIT_NO_PROGRESS, EXIT_STOPPED

DELIBERATE = (EXIT_BAD_CONFIG, EXIT_NO_PROGRESS, EXIT_STOPPED)
"""Statuses that no restart would change. If ranks differ, the first of these is the run's."""


@dataclass(frozen=True)
class Outcome:
    """How the ranks of all nodes ended."""

    status: int
    """The run's exit status, as a shell shows it: 128 + N for signal N."""
    rank: int | None = None
    """The rank that ended it by a fault; None if no rank did."""

    @property
    def is_fault(self) -> bool:
        """Whether it ended by a fault, after which a restart may help."""
        return self.rank is not None

    @property
    def description(self) -> str:
        """What happened to ``rank``."""
        if self.status > 128:
            return f"rank {self.rank} was ended by {signal_name(self.status - 128)}"
        return f"rank {self.rank} ended with status {self.status}"


def outcome(statuses: Mapping[int, int], *, first_failed: int | None) -> Outcome:
    """Return the outcome of a start.

    Args:
        statuses: rank -> its status as Python has it, -N for signal N.
        first_failed: the rank that was the first to end with another status than 0.
    """
    for status in DELIBERATE:
        if status in statuses.values():
            return Outcome(status)
    if first_failed is None or not statuses[first_failed]:
        return Outcome(EXIT_FINISHED)
    status = statuses[first_failed]
    return Outcome(status if status > 0 else 128 - status, first_failed)


def signal_name(number: int) -> str:
    """Return the name of a signal, or its number if it has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@dataclass
class RestartBudget:
    """Counts the restarts in a row without a new committed step."""

    max_restarts: int
    newest_step: int
    """The highest step that was ever committed."""
    in_a_row: int = 0

    def take(self, newest_step: int) -> bool:
        """Take a restart, given the newest committed step. Return whether there was one left."""
        if newest_step > self.newest_step:
            self.newest_step, self.in_a_row = newest_step, 0
        if self.in_a_row >= self.max_restarts:
            return False
        self.in_a_row += 1
        return True
