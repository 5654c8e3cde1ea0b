"""The console sink: a progress line on a terminal, plain lines otherwise.

All output of a run is printed through it. On a terminal the progress line is rewritten in place,
and all other lines are printed above it. This uses two control codes instead of rich's live
display, which hides the cursor and captures stdout: a killed run must not leave the terminal in a
changed state.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from contextlib import suppress
from typing import TextIO

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from kempnerforge.printable import printable
from kempnerforge.telemetry.console_text import commit_line, eval_line, is_non_finite, train_fields
from kempnerforge.telemetry.sinks import Row

_UNSHOWABLE = (OSError, UnicodeEncodeError)
_ERASE_LINE = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))
_REDRAW_INTERVAL_S = 0.1
_BAR_CELLS = 20
_ETA_WINDOW_STEPS = 50


class ConsoleSink:
    """Prints rows as text, and selects the rows that get a line.

    A closed pipe, or a full disk behind stdout, never stops the run.

    Args:
        max_steps: the last step of the run, for progress and ETA.
        log_interval: steps between plain lines. The progress line on a terminal shows every step.
        file: the output file; standard output by default.
        has_progress_line: whether to rewrite a progress line on a terminal.
    """

    def __init__(
        self,
        max_steps: int,
        log_interval: int,
        *,
        file: TextIO | None = None,
        has_progress_line: bool = True,
    ) -> None:
        self._console = _PipeSafeConsole(file=file or sys.stdout, highlight=False, emoji=False)
        # Not rich's is_terminal: FORCE_COLOR would put control codes into log files.
        is_terminal = self._console.file.isatty() and not self._console.is_dumb_terminal
        self._live = has_progress_line and is_terminal
        self._bar_glyphs = "#-" if self._console.options.ascii_only else "━━"
        self.max_steps = max_steps
        self._log_interval = log_interval
        self._progress: Text | None = None
        self._drawn_at_s = float("-inf")
        self._pace = _Pace()
        self._seen_train_row = False

    def write(self, row: Row) -> None:
        """Show ``row``: training progress, a validation result, a committed checkpoint, or nothing."""
        if "train/loss" in row:
            self._show_progress(row)
        if "eval/loss" in row:
            self._print(eval_line(row), "bold cyan")
        if "checkpoint/commit_s" in row:
            self._print(commit_line(row), "green")

    def note(self, text: str) -> None:
        """Print an informational message."""
        self._print(text, "")

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._print(f"warning: {text}", "bold yellow")

    def close(self) -> None:
        """Keep the last progress line on screen, with the cursor below it."""
        self._end_progress()

    def _end_progress(self) -> None:
        if self._progress is not None:
            with suppress(*_UNSHOWABLE):
                self._draw()
                self._console.print()
            self._progress = None

    def _show_progress(self, row: Row) -> None:
        step = row["step"]
        fields = "  ".join(train_fields(row, self._pace.eta_s(step, self.max_steps)))
        first, self._seen_train_row = not self._seen_train_row, True
        if is_non_finite(row):
            self._print(f"step {step}/{self.max_steps}  {fields}  skipped: not finite", "bold red")
        elif self._live:
            self._progress = Text.assemble(
                self._bar(step), (f" step {step}/{self.max_steps}", "bold"), f"  {fields}"
            )
            if step >= self.max_steps:
                self._end_progress()
            elif time.monotonic() - self._drawn_at_s >= _REDRAW_INTERVAL_S:
                with suppress(*_UNSHOWABLE):
                    self._draw()
        elif first or step % self._log_interval == 0 or step >= self.max_steps:
            self._print(f"step {step}/{self.max_steps}  {fields}", "")

    def _print(self, text: str, style: str) -> None:
        with suppress(*_UNSHOWABLE):
            if self._live:
                self._console.control(_ERASE_LINE)
            # soft_wrap: the terminal wraps long lines, and a log file keeps them whole.
            self._console.print(Text(printable(text, lines=True), style=style), soft_wrap=True)
            if self._progress is not None:
                self._draw()

    def _draw(self) -> None:
        if self._progress is None:
            return
        line = self._progress.copy()
        # One cell less than the width: a full line would wrap, and erasing clears one line only.
        line.truncate(self._console.width - 1, overflow="ellipsis")
        self._console.control(_ERASE_LINE)
        self._console.print(line, end="", no_wrap=True, crop=True)
        self._drawn_at_s = time.monotonic()

    def _bar(self, step: int) -> Text:
        done = min(_BAR_CELLS, _BAR_CELLS * step // max(self.max_steps, 1))
        done_glyph, left_glyph = self._bar_glyphs
        return Text.assemble((done_glyph * done, "green"), (left_glyph * (_BAR_CELLS - done), "bright_black"))


class _PipeSafeConsole(Console):
    def on_broken_pipe(self) -> None:
        """Stop printing. Rich would exit the process, but a training run must survive ``| head``."""
        with suppress(SystemExit):
            super().on_broken_pipe()


class _Pace:
    """Steps per second over the last steps in wall time, including saves and validation."""

    def __init__(self) -> None:
        self._marks: deque[tuple[int, float]] = deque(maxlen=_ETA_WINDOW_STEPS)

    def eta_s(self, step: int, max_steps: int) -> float | None:
        """Record ``step`` and return the seconds until ``max_steps``, or None after a single step."""
        self._marks.append((step, time.monotonic()))
        first_step, first_s = self._marks[0]
        if step <= first_step:
            return None
        return (max_steps - step) * (self._marks[-1][1] - first_s) / (step - first_step)
