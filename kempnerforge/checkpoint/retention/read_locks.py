"""Read locks: they keep retention from deleting a step while a process reads it.

A read lock is a small file ``step_00001000.<random>.json`` in ``holds/`` of the checkpoint folder.
It names the process that reads the step, and why. The protocol:

1. The reader creates the file, and then checks that the step still exists. Retention renames a step
   before it checks for locks a second time, and restores the name if it finds one. So at least one
   of the two sees the other, and a reader that passed the check reads undisturbed.
2. A thread of the reader touches the file every ``RENEW_EVERY_S``. At the end the reader removes
   the file.
3. A lock that was not touched for ``LIFETIME_S`` is stale. So is one whose process has ended, if
   that can be known: on the same kernel. Stale locks protect nothing, and retention removes them.
   So a killed reader delays a deletion by ten minutes at most.

The age of a lock is the difference of the file's time and the observer's clock. Clocks that differ
by less than nine minutes do no harm.

A reader that may not write to the folder reads without a lock. If the step is deleted meanwhile, it
finds a file missing. On a network file system that shows a new file late, this can happen to any
reader for a few seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kempnerforge import fsio
from kempnerforge.checkpoint.format import paths
from kempnerforge.errors import StepNotFoundError
from kempnerforge.process_identity import ProcessIdentity

FOLDER = "holds"
LIFETIME_S = 600.0
RENEW_EVERY_S = 60.0

_CREATE_TRIES = 100
"""A file system that keeps reporting the folder as missing must not block a reader."""
_NAME = re.compile(r"(step_\d+)\.[0-9a-f]+\.json")


@dataclass(frozen=True)
class ReadLock:
    """One file in ``holds/``."""

    path: Path
    step: int
    reader: str
    """The reader: purpose, process and host."""
    stale: bool


@contextlib.contextmanager
def lock_for_reading(step_folder: Path, *, what: str) -> Iterator[bool]:
    """Keep retention from deleting ``step_folder`` while the block runs. ``what``: the purpose, for messages.

    Yields True if the step is locked. Yields False if the folder is not writable, or if it is not a
    step of a run, which nothing prunes. Raises StepNotFoundError if the step does not exist.
    """
    step_folder = step_folder.resolve()
    path = None if paths.step_number(step_folder.name) is None else _create(step_folder, what)
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=(path, ended), name="hold", daemon=True)
    try:
        if not step_folder.is_dir():
            raise StepNotFoundError(f"{step_folder} does not exist")
        if path is not None:
            renewal.start()
        yield path is not None
    finally:
        ended.set()
        if renewal.is_alive():
            renewal.join()
        if path is not None:
            with contextlib.suppress(OSError):  # a leftover is stale as soon as this process has ended
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the folder has locks of other readers
                path.parent.rmdir()


def read(folder: Path, *, now: float | None = None) -> list[ReadLock]:
    """Return the read locks in the checkpoint folder ``folder``, including stale ones."""
    now = time.time() if now is None else now
    observer = ProcessIdentity.of_this_process(0)
    found = []
    try:
        entries = sorted((folder / FOLDER).iterdir())
    except FileNotFoundError:
        return []
    for path in entries:
        match = _NAME.fullmatch(path.name)
        step = paths.step_number(match[1]) if match else None
        if step is None:
            continue
        with contextlib.suppress(FileNotFoundError):
            age_s = now - path.lstat().st_mtime
            reader, holder = _decode(fsio.read_mark(path))
            ended = holder is not None and holder.has_ended(observer)
            found.append(ReadLock(path, step, reader, stale=ended or age_s > LIFETIME_S))
    return found


def readers(folder: Path, *, now: float | None = None) -> dict[int, list[str]]:
    """Return step -> its readers, for all locks that are not stale."""
    found: dict[int, list[str]] = {}
    for lock in read(folder, now=now):
        if not lock.stale:
            found.setdefault(lock.step, []).append(lock.reader)
    return found


def remove_stale(folder: Path, *, now: float | None = None) -> None:
    """Remove stale read locks."""
    for lock in read(folder, now=now):
        if lock.stale:
            with contextlib.suppress(OSError):  # another user's file, which protects nothing
                lock.path.unlink()


def _create(step_folder: Path, what: str) -> Path | None:
    reader = ProcessIdentity.of_this_process(0)
    path = step_folder.parent / FOLDER / f"{step_folder.name}.{reader.token}.json"
    data = (json.dumps({"what": what, "reader": asdict(reader)}) + "\n").encode()
    for _ in range(_CREATE_TRIES):
        try:
            with contextlib.suppress(FileExistsError):
                fsio.new_folder(path.parent)
            fsio.write_new_file(path, data)
            return path
        except FileNotFoundError:
            # Another reader removed the empty folder meanwhile. Without its parent the step does not exist.
            if not step_folder.parent.is_dir():
                raise StepNotFoundError(f"{step_folder} does not exist") from None
        except OSError:  # no permission, read-only, or full: reading needs no space
            return None
    return None


def _renew(path: Path, ended: threading.Event) -> None:
    while not ended.wait(RENEW_EVERY_S):
        with contextlib.suppress(OSError):
            # Create it again if it was removed: this process was suspended for so long that it looked dead.
            os.close(fsio.open_file(path, os.O_WRONLY))
            os.utime(path)


def _decode(data: bytes) -> tuple[str, ProcessIdentity | None]:
    """Return the reader and its process. A lock that cannot be parsed is still being written."""
    try:
        body: dict[str, Any] = json.loads(data)
        holder = ProcessIdentity(**body["reader"])
        return f"{body['what']} (pid {holder.pid} on {holder.host})", holder
    except (ValueError, TypeError, KeyError, RecursionError):
        return "a reader", None
