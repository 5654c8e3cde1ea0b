"""Ledger events about saves and deletions. docs/reference/run-folder.md describes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kempnerforge.checkpoint.results import SaveReport

MAX_EVENTS = 1000
"""Limit on events kept for a caller that does not fetch them. Older ones are dropped."""
_COMMIT = ("step", "reason", "blocking_s", "write_s", "commit_s", "total_s", "size_bytes")


@dataclass(frozen=True)
class SaveEvent:
    """One event."""

    kind: str
    """``commit``, ``failed``, ``skipped``, ``put_off`` or ``deleted``."""
    values: dict[str, Any] = field(default_factory=dict)


def event_of(report: SaveReport) -> SaveEvent:
    """Return the event for the outcome of a save."""
    if report.skipped:
        return SaveEvent("skipped", {"step": report.step, "reason": report.reason, "why": report.skipped})
    if report.error:
        return SaveEvent("failed", {"step": report.step, "reason": report.reason, "error": report.error})
    overhead_s = None if report.overhead_is_lower_bound else report.overhead_s
    return SaveEvent("commit", {**{name: getattr(report, name) for name in _COMMIT}, "tax_s": overhead_s})


@dataclass
class PutOff:
    """A save that is deferred because an earlier one is still being written."""

    reason: str
    """Why it is due."""
    writing: int
    """The step that is being written."""
    first: int
    """The first step at which it was deferred."""
    last: int
    """The last step at which it was deferred."""

    def begins(self) -> SaveEvent:
        """Return the event for the beginning of the deferral. After a crash it may be the only one."""
        return SaveEvent("put_off", self._values(to_step=None, saved_step=None))

    def ends(self, saved_step: int | None) -> SaveEvent:
        """Return the event for the end of the deferral. ``saved_step``: the step saved instead, if any."""
        return SaveEvent("put_off", self._values(to_step=self.last, saved_step=saved_step))

    def _values(self, *, to_step: int | None, saved_step: int | None) -> dict[str, Any]:
        return {
            "from_step": self.first,
            "to_step": to_step,
            "reason": self.reason,
            "writing": self.writing,
            "saved_step": saved_step,
        }


def deleted(steps: Sequence[int], rules: Sequence[str], *, after_commit: int | None) -> SaveEvent:
    """Return the event for ``steps`` that retention deleted because none of ``rules`` kept them.

    ``after_commit``: the step that was committed just before; None if they were deleted for space.
    """
    return SaveEvent("deleted", {"steps": list(steps), "rules": list(rules), "after_commit": after_commit})
