"""Steps that somebody is reading, which retention must not delete meanwhile.

A hold is a small file in ``holds/`` of the checkpoint folder, ``step_00001000.<random>.json``, that says
which process reads the step and what for. The protocol:

1. The reader creates the file, then looks whether the step is still there. Retention takes a step's name away
   before it looks for holds a second time, and gives it back when it finds one. So at least one of the two
   sees the other, and a reader that got past this point reads undisturbed.
2. A thread of the reader touches the file every ``RENEW_EVERY_S``; at the end the reader removes it.
3. A hold that nobody has touched for ``LIFETIME_S`` is stale, and so is one whose process has ended, where
   that can be known: on the same kernel. Stale holds keep nothing, and retention removes them. So a reader
   that was killed delays a deletion by ten minutes at most.

Ages are judged by the files' times and the observer's clock; clocks that differ by less than nine minutes do
no harm. A reader that may not write to the folder goes on without a hold: that the step was deleted it learns
when a file is missing. So may, for seconds, any reader on a network file system that shows a new file late.
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
"""A file system that keeps refusing the folder as missing must not hold up a reader."""
_NAME = re.compile(r"(step_\d+)\.[0-9a-f]+\.json")


@dataclass(frozen=True)
class ReadLock:
    """One file in ``holds/``."""

    path: Path
    step: int
    reader: str
    """What reads the step, and where."""
    stale: bool


@contextlib.contextmanager
def lock_for_reading(step_folder: Path, *, what: str) -> Iterator[bool]:
    """Keep retention from deleting ``step_folder`` while the block runs. ``what`` says what is being done.

    Gives True when the step is held; False when it could not be, because the folder is not writable or
    does not hold steps of a run, so that nothing prunes it. Raises StepNotFoundError when it is gone.
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
            with contextlib.suppress(OSError):  # what stays is stale as soon as this process has ended
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others hold steps
                path.parent.rmdir()


def read(folder: Path, *, now: float | None = None) -> list[ReadLock]:
    """The holds in the checkpoint folder ``folder``, stale ones included."""
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
    """Step -> who reads it now."""
    found: dict[int, list[str]] = {}
    for one in read(folder, now=now):
        if not one.stale:
            found.setdefault(one.step, []).append(one.reader)
    return found


def remove_stale(folder: Path, *, now: float | None = None) -> None:
    """Remove the holds that keep nothing any more."""
    for one in read(folder, now=now):
        if one.stale:
            with contextlib.suppress(OSError):  # somebody else's file; it keeps nothing
                one.path.unlink()


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
            # Another reader removed the empty folder in between; without a parent there is no step either.
            if not step_folder.parent.is_dir():
                raise StepNotFoundError(f"{step_folder} does not exist") from None
        except OSError:  # not ours to write, read-only, or full: reading needs no room
            return None
    return None


def _renew(path: Path, ended: threading.Event) -> None:
    while not ended.wait(RENEW_EVERY_S):
        with contextlib.suppress(OSError):
            # Makes it anew when it is gone: this process slept for so long that it was taken for dead.
            os.close(fsio.open_file(path, os.O_WRONLY))
            os.utime(path)


def _decode(data: bytes) -> tuple[str, ProcessIdentity | None]:
    """What reads, and the process; an unreadable hold is one that is being written."""
    try:
        body: dict[str, Any] = json.loads(data)
        holder = ProcessIdentity(**body["reader"])
        return f"{body['what']} (pid {holder.pid} on {holder.host})", holder
    except (ValueError, TypeError, KeyError, RecursionError):
        return "a reader", None
