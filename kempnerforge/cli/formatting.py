"""Output of ``kempnerforge ckpt``: JSON, columns, sizes, ages, progress bars."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer

MAX_VALUE_WIDTH = 80


def print_json(body: Any) -> None:
    """Print one JSON object."""
    typer.echo(json.dumps(body, indent=2))


def print_columns(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Print rows in columns. Columns whose index is in ``right`` are right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    typer.echo("\n".join(lines))


def size(size_bytes: int) -> str:
    """Return bytes as readable text, in powers of 1000."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    number = float(size_bytes)
    for unit in ("kB", "MB", "GB", "TB"):
        number /= 1000
        if number < 999.95:
            return f"{number:.1f} {unit}"
    return f"{number / 1000:.1f} PB"


def count(number: int, what: str) -> str:
    """Return ``1 step`` or ``2,000 steps``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def age(then: float) -> str:
    """Return how long ago ``then`` (seconds since the epoch) was."""
    seconds = max(0, int(time.time() - then))
    if seconds < 60:
        return f"{seconds} s"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if minutes < 60:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{days} days"


def value(content: Any) -> str:
    """Return a value on one line, truncated to ``MAX_VALUE_WIDTH`` characters."""
    text = json.dumps(content, ensure_ascii=False)
    return text if len(text) <= MAX_VALUE_WIDTH else f"{text[: MAX_VALUE_WIDTH - 3]}..."


def flatten(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and values of nested tables. Lists are values, unless they contain tables."""
    if isinstance(content, dict) and content:
        for key, below in content.items():
            yield from flatten(below, f"{path}.{key}" if path else str(key))
    elif isinstance(content, list) and content and all(isinstance(item, dict) for item in content):
        for index, item in enumerate(content):
            yield from flatten(item, f"{path}[{index}]")
    else:
        yield path, content


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar, updated by calls with (bytes done, bytes in total). No bar without a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    # Imported here: rich takes longer to import than most commands take to run.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
