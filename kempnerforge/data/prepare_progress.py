"""How far the text is tokenized, and at which rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from kempnerforge.data.token_parts import Task

LINE_EVERY_S = 10.0
"""Shortest time between two lines of :func:`plain_lines`."""


@dataclass(frozen=True)
class Progress:
    """How far the text is tokenized."""

    done_bytes: int
    """Bytes of the files that are done, those of an earlier process included."""
    total_bytes: int
    text_bytes: int
    """Bytes of text that this process and its workers have tokenized."""
    tokens: int
    """Tokens of it."""
    seconds: float

    @property
    def rate(self) -> str:
        """Bytes and tokens per second, for display."""
        seconds = max(self.seconds, 1e-9)
        return f"{self.text_bytes / seconds / 1e6:.1f} MB/s, {self.tokens / seconds / 1e6:.2f}M tokens/s"


OnProgress = Callable[[Progress], None]


def plain_lines(write: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> OnProgress:
    """Return a callback that writes a line now and then, for logs and pipes."""
    last = clock()

    def write_line(progress: Progress) -> None:
        nonlocal last
        if clock() - last >= LINE_EVERY_S:
            last = clock()
            write(f"tokenized {progress.done_bytes:,} of {progress.total_bytes:,} bytes, {progress.rate}")

    return write_line


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
            self._progress(Progress(done_bytes, self._total_bytes, self._text_bytes, self._tokens, seconds))
