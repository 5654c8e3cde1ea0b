"""How far the preparation of text is, and at which rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kempnerforge.data.token_parts import Task

LINE_EVERY_S = 10.0
"""Shortest time between two lines of :func:`plain_lines`."""


Activity = Literal["found", "read", "tokenized", "wrote"]
"""What was done with the bytes so far. Files are found, read to know their content, and tokenized. Then
the tokens are written into shards."""


@dataclass(frozen=True)
class Progress:
    """How far one activity is."""

    activity: Activity
    done_bytes: int
    """Bytes of the files, or of the tokens, that are done, those of an earlier process included."""
    total_bytes: int
    """0 if it is not known yet."""
    text_bytes: int
    """Bytes that this process and its workers have done: of text while it is tokenized."""
    tokens: int
    """Tokens that they have made."""
    seconds: float
    """Since the activity began."""

    @property
    def rate(self) -> str:
        """Bytes and tokens per second, for display. Empty while it is not known how many there are."""
        if not self.total_bytes:
            return ""
        seconds = max(self.seconds, 1e-9)
        rate = f"{self.text_bytes / seconds / 1e6:.1f} MB/s"
        return f"{rate}, {self.tokens / seconds / 1e6:.2f}M tokens/s" if self.tokens else rate

    @property
    def line(self) -> str:
        """The progress as a line of text."""
        what = {"found": "files of ", "read": "", "tokenized": "", "wrote": "tokens: "}[self.activity]
        total = f" of {self.total_bytes:,} bytes, {self.rate}" if self.total_bytes else " bytes"
        return f"{self.activity} {what}{self.done_bytes:,}{total}"


OnProgress = Callable[[Progress], None]


def plain_lines(write: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> OnProgress:
    """Return a callback that writes a line now and then, for logs and pipes."""
    last = clock()

    def write_line(progress: Progress) -> None:
        nonlocal last
        if clock() - last >= LINE_EVERY_S:
            last = clock()
            write(progress.line)

    return write_line


class Meter:
    """Counts the bytes of one activity for the caller's progress callback."""

    def __init__(self, activity: Activity, total_bytes: int, progress: OnProgress | None) -> None:
        self._activity: Activity = activity
        self._total_bytes = total_bytes
        self._progress = progress
        self._started = time.monotonic()
        self._done_bytes = 0

    def add(self, size_bytes: int) -> None:
        """Count ``size_bytes`` more."""
        self._done_bytes += size_bytes
        if self._progress is not None:
            done, seconds = self._done_bytes, time.monotonic() - self._started
            self._progress(Progress(self._activity, done, self._total_bytes, done, 0, seconds))


class Reporter:
    """Sums what the workers report for the caller's progress callback."""

    def __init__(self, total_bytes: int, progress: OnProgress | None) -> None:
        self._total_bytes = total_bytes
        self._progress = progress
        self._started = time.monotonic()
        self._done_bytes = self._text_bytes = self._tokens = 0
        self._begun: dict[int, int] = {}
        """Task that is not finished -> bytes of text so far."""

    def add(self, task: Task, text_bytes: int, tokens: int) -> None:
        """Add what was written for ``task`` since the last call."""
        # Compressed files have more text than bytes on disk.
        self._begun[task.number] = min(task.size_bytes, self._begun.get(task.number, 0) + text_bytes)
        self._text_bytes += text_bytes
        self._tokens += tokens
        self._report()

    def finish(self, task: Task) -> None:
        """Count ``task`` as done."""
        self._begun.pop(task.number, None)
        self._done_bytes += task.size_bytes
        self._report()

    def _report(self) -> None:
        if self._progress is not None:
            done_bytes = self._done_bytes + sum(self._begun.values())
            seconds = time.monotonic() - self._started
            done = (done_bytes, self._total_bytes, self._text_bytes, self._tokens)
            self._progress(Progress("tokenized", *done, seconds))
