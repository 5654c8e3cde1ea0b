"""Show the log records of a training process or a command. A program of your own sets its own handlers.

Modules log with ``logging.getLogger(__name__)``. Rank 0 shows records from INFO on. The other ranks
show errors, and records that are marked with ``THIS_RANK``: everything else they log is the same as
on rank 0. ``KEMPNERFORGE_LOG`` sets another level. With ``debug``, every rank writes all its records
to standard error, each with time, rank, level and module.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Protocol

from kempnerforge.errors import ConfigError, ConfigIssue
from kempnerforge.printable import printable

VARIABLE = "KEMPNERFORGE_LOG"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}

THIS_RANK = {"of_this_rank": True}
"""``extra=`` of a record about this rank only, which is shown on every rank."""

_STDERR = 2


class Console(Protocol):
    """Shows messages above the progress line of a run."""

    def note(self, text: str) -> None:
        """Show an informational message."""
        ...

    def warn(self, text: str) -> None:
        """Show a warning."""
        ...


def level_from(environ: Mapping[str, str]) -> int:
    """Return the level that ``KEMPNERFORGE_LOG`` names, in any case; INFO if it is unset.

    Raises:
        ConfigError: it names no level.
    """
    name = environ.get(VARIABLE) or "info"
    if (level := LEVELS.get(name.lower())) is None:
        problem = f'"{name}" is not one of debug, info, warning'
        raise ConfigError([ConfigIssue(VARIABLE, problem, "set one of them, or unset it", "environment")])
    return level


class LogHandler(logging.Handler):
    """Shows the records of one process.

    Args:
        level: the lowest level shown. DEBUG also shows time, rank, level and module.
        rank: the rank of this process.
        console: shows the messages of rank 0 below ERROR. Without it, all go to standard error.
        warning_head: precedes warnings on standard error.
    """

    def __init__(
        self, level: int, *, rank: int, console: Console | None = None, warning_head: str = ""
    ) -> None:
        super().__init__(level)
        self._rank = rank
        self._is_debug = level <= logging.DEBUG
        self._console = None if self._is_debug else console
        self._warning_head = warning_head
        self._is_direct = False
        self.setFormatter(
            logging.Formatter(
                f"%(asctime)s.%(msecs)03d rank {rank} %(levelname)s %(name)s: %(message)s",
                "%Y-%m-%d %H:%M:%S",
            )
        )

    def write_directly(self) -> None:
        """Take no lock from now on, because a main thread that is stuck may hold it."""
        self._is_direct = True

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to show ``record`` on this rank."""
        is_shared = record.levelno < logging.ERROR and not getattr(record, "of_this_rank", False)
        return self._is_debug or self._rank == 0 or not is_shared

    def handle(self, record: logging.LogRecord) -> bool:
        """Show ``record``. Waits while another thread shows one, except after ``write_directly``."""
        if not self._is_direct:
            return bool(super().handle(record))
        if is_shown := self.filter(record):
            with suppress(OSError):  # standard error is closed, and nothing else is left to write to
                os.write(_STDERR, f"{self._text(record)}\n".encode(errors="replace"))
        return is_shown

    def emit(self, record: logging.LogRecord) -> None:
        """Show ``record`` on the console or on standard error."""
        try:
            if self._console is None or record.levelno >= logging.ERROR:
                print(self._text(record), file=sys.stderr, flush=True)
            elif record.levelno >= logging.WARNING:
                self._console.warn(record.getMessage())
            else:
                self._console.note(record.getMessage())
        except Exception:  # noqa: BLE001 - logging must not end a run
            self.handleError(record)

    def _text(self, record: logging.LogRecord) -> str:
        if self._is_debug:
            return printable(self.format(record), lines=True)
        head = self._warning_head if record.levelno == logging.WARNING else ""
        return printable(f"{head}{record.getMessage()}", lines=True)


@contextmanager
def shown_by(handler: LogHandler) -> Iterator[None]:
    """Show the records of all modules of this package with ``handler``, and with no other handler."""
    logger = logging.getLogger("kempnerforge")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(handler.level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
