"""How ``kempnerforge ckpt`` prints: JSON, columns, sizes, ages, progress."""

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
    """Print rows in columns; those at the positions ``right`` are aligned to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    typer.echo("\n".join(lines))


def size(size_bytes: int) -> str:
    """Bytes for people, in powers of 1000."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    number = float(size_bytes)
    for unit in ("kB", "MB", "GB", "TB"):
        number /= 1000
        if number < 999.95:
            return f"{number:.1f} {unit}"
    return f"{number / 1000:.1f} PB"


def count(number: int, what: str) -> str:
    """``1 step``, ``2,000 steps``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def age(then: float) -> str:
    """How long ago ``then`` (seconds since the epoch) was."""
    seconds = max(0, int(time.time() - then))
    if seconds < 60:
        return f"{seconds} s"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if minutes < 60:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{days} days"


def value(content: Any) -> str:
    """A value on one line, cut when it is long."""
    text = json.dumps(content, ensure_ascii=False)
    return text if len(text) <= MAX_VALUE_WIDTH else f"{text[: MAX_VALUE_WIDTH - 3]}..."


def flatten(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of nested tables; a list of tables counts as one, any other list as a value."""
    if isinstance(content, dict) and content:
        for key, below in content.items():
            yield from flatten(below, f"{path}.{key}" if path else str(key))
    elif isinstance(content, list) and content and all(isinstance(item, dict) for item in content):
        for place, item in enumerate(content):
            yield from flatten(item, f"{path}[{place}]")
    else:
        yield path, content


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal for what is told (bytes done, bytes in all); nothing where there is none."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    # Here, not above: rich takes longer to import than most commands take.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
