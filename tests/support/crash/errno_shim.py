"""Let one file operation of this process fail, below one folder, with any errno.

Production code has no hooks for this.

``file_watcher`` records changes for the disk model. This module also sees reads and look-ups. It
names an operation by its kind and path, so that a process with another pid can find the same
operation.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

DELAY = "delay"
DELAY_S = 2.0
HOLD = "hold"
"""The fault of another thread's operation that lasts until the loop has finished all its steps."""
HELD_AT_MOST_S = 60.0

_LOOKS = ("stat", "lstat", "fstat", "scandir", "listdir", "readlink", "statvfs")
_READS = ("open", "read", "pread", "preadv")
_NEW = ("create", "mkdir", "symlink", "link")
_GOES = ("unlink", "rmdir")
_DATA = ("write", "pwrite", "fsync", "fdatasync", "ftruncate", "utime", "chmod")
_APPLIES = {
    "EIO": (*_LOOKS, *_READS, *_NEW, *_GOES, *_DATA, "rename"),
    "ESTALE": (*_LOOKS, *_READS, *_NEW, *_GOES, *_DATA, "rename"),
    "EPERM": ("scandir", "listdir", "open", *_NEW, *_GOES, "rename", "utime", "chmod"),
    "ENOENT": (*_LOOKS, "open", *_NEW, *_GOES, "rename"),
    "ENOTEMPTY": ("rmdir", "rename"),
    "EXDEV": ("rename", "link"),
    "EINVAL": ("open", "create", "pwrite", "fsync", "rename"),
    "ENOSPC": (*_NEW, "write", "pwrite", "fsync", "rename"),
    "EROFS": ("create", "mkdir", "symlink", "link", *_GOES, "rename", "utime", "chmod"),
    DELAY: (*_LOOKS, *_READS, *_NEW, *_GOES, *_DATA, "rename"),
}
"""The operations on which an errno is tried: those for which some file system returns it."""

_ON_PATHS = (
    "stat",
    "lstat",
    "scandir",
    "listdir",
    "readlink",
    "statvfs",
    "mkdir",
    "unlink",
    "rmdir",
    "utime",
    "chmod",
)
_ON_DESCRIPTORS = ("fstat", "read", "pread", "preadv", "write", "pwrite", "fsync", "fdatasync", "ftruncate")
_TOKENS = re.compile(r"(?<=[.-])[0-9a-f]{12,}\b")

REAL = {name: getattr(os, name) for name in dir(os) if callable(getattr(os, name))}
_REAL_OPEN = io.open


@dataclass(frozen=True)
class Operation:
    """One operation of a recording."""

    op: str
    path: str
    """Path below the root. Process ids and random names are replaced by stars."""
    nth: int
    """Number of equal operations before it."""

    def faults(self) -> list[str]:
        """Return the faults that may happen to it."""
        return [name for name, ops in _APPLIES.items() if self.op in ops]


@dataclass(frozen=True)
class Strike:
    """A fault for one operation."""

    operation: Operation
    fault: str
    """Name of an errno, ``delay`` or ``hold``."""
    always: bool
    """Whether it also happens to all later operations of the same kind and path."""

    def __str__(self) -> str:
        one = self.operation
        return f"{self.fault} at {one.op} {one.path} #{one.nth}{' and later' if self.always else ''}"


class Loop:
    """Observes the main thread of the training loop in this process, between its first step and its end.

    ``begin`` and ``end`` are called on the main thread.
    """

    def __init__(self) -> None:
        self.hold_all = False
        """Whether to hold all operations of other threads."""
        self.is_on = False
        self.operations: list[tuple[str, str]] = []
        """Kind and path of the operations of the main thread."""
        self.elsewhere: set[tuple[str, str]] = set()
        """Kind and path of the operations of other threads."""
        self.waits: Counter[str] = Counter()
        """Waits of the main thread that ended at their time limit, by the module that waited."""
        self.gave_up = False
        """Whether a held operation timed out before the loop ended: the loop must have waited for it."""
        self.held = 0
        """Number of operations that were held."""
        self._ended = threading.Event()

    def begin(self) -> None:
        """Record that a step begins."""
        self.is_on = not self._ended.is_set()

    def end(self) -> None:
        """Record that all steps are done, and release the operations that were held."""
        self.is_on = False
        self._ended.set()

    def meet(self, op: str, name: str) -> None:
        """Record that an operation begins."""
        if not self.is_on:
            return
        if threading.current_thread() is threading.main_thread():
            self.operations.append((op, name))
            return
        self.elsewhere.add((op, name))
        if self.hold_all:
            self.hold()

    def hold(self) -> None:
        """Wait until the loop has ended. Do nothing on the main thread."""
        if not self.is_on or threading.current_thread() is threading.main_thread():
            return
        self.held += 1
        self.gave_up |= not self._ended.wait(HELD_AT_MOST_S)

    def count_waits(self) -> None:
        """Count waits of the main thread from now on."""
        real = threading.Condition.wait

        def wait(condition: threading.Condition, timeout: float | None = None) -> bool:
            was_on = self.is_on
            woken = real(condition, timeout)
            if was_on and not woken and threading.current_thread() is threading.main_thread():
                self.waits[_waiting_module()] += 1
            return woken

        threading.Condition.wait = wait  # type: ignore[method-assign]


def _waiting_module() -> str:
    frame = sys._getframe(2)
    while frame is not None and not frame.f_globals["__name__"].startswith("kempnerforge"):
        frame = frame.f_back
    return frame.f_globals["__name__"] if frame is not None else "elsewhere"


class Shim:
    """Records the operations of this process below ``root``, and injects a fault once it is armed."""

    def __init__(self, root: str, strike: Strike | None = None) -> None:
        self._root = os.path.realpath(root)
        self._strike = strike
        self._lock = threading.Lock()
        self._seen: Counter[tuple[str, str]] = Counter()
        self.operations: list[Operation] = []
        self.fired = 0
        self.loop = Loop()

    def install(self) -> None:
        """Replace functions of ``os``, and ``open``."""
        for name in _ON_PATHS:
            setattr(os, name, self._on_path(name))
        os.remove = os.unlink
        for name in _ON_DESCRIPTORS:
            setattr(os, name, self._on_descriptor(name))
        for name in ("rename", "replace", "link"):
            setattr(os, name, self._on_two_paths(name))
        os.symlink = self._symlink
        os.open = self._open
        io.open = builtins.open = self._open_file

    def uninstall(self) -> None:
        """Restore all functions."""
        for name in ("open", "remove", "symlink", "rename", "replace", "link", *_ON_PATHS, *_ON_DESCRIPTORS):
            setattr(os, name, REAL[name])
        io.open = builtins.open = _REAL_OPEN

    def _meet(self, op: str, path: str | None) -> None:
        """Record an operation. ``path`` is absolute; None for a path outside the root."""
        if path is None:
            return
        name = _TOKENS.sub("*", os.path.relpath(path, self._root).replace(f".{os.getpid()}", ".*"))
        self.loop.meet(op, name)
        with self._lock:
            nth, self._seen[op, name] = self._seen[op, name], self._seen[op, name] + 1
            self.operations.append(Operation(op, name, nth))
            strike = self._strike
            if strike is None or (strike.operation.op, strike.operation.path) != (op, name):
                return
            if nth != strike.operation.nth and not (strike.always and nth > strike.operation.nth):
                return
            self.fired += 1
        if strike.fault == HOLD:
            self.loop.hold()
            return
        if strike.fault == DELAY:
            time.sleep(DELAY_S)
            return
        number = getattr(errno, strike.fault)
        raise OSError(number, f"{os.strerror(number)} (made by a test)", path)

    def _path(self, first: Any, folder_fd: int | None = None) -> str | None:
        """Return the absolute path of an operation; None if it is not below the root."""
        try:
            if isinstance(first, int):
                text = REAL["readlink"](f"/proc/self/fd/{first}")
            else:
                text = os.fsdecode(first)
                if folder_fd is not None and not os.path.isabs(text):
                    text = os.path.join(REAL["readlink"](f"/proc/self/fd/{folder_fd}"), text)
        except (OSError, TypeError):
            return None
        text = os.path.abspath(text)
        return text if text == self._root or text.startswith(self._root + "/") else None

    def _on_path(self, name: str) -> Callable[..., Any]:
        def call(path: Any = ".", *args: Any, **options: Any) -> Any:
            self._meet(name, self._path(path, options.get("dir_fd")))
            return REAL[name](path, *args, **options)

        return call

    def _on_descriptor(self, name: str) -> Callable[..., Any]:
        def call(fd: Any, *args: Any) -> Any:
            self._meet(name, self._path(fd if isinstance(fd, int) else fd.fileno()))
            return REAL[name](fd, *args)

        return call

    def _on_two_paths(self, name: str) -> Callable[..., Any]:
        def call(source: Any, target: Any, **options: Any) -> Any:
            at = self._path(source, options.get("src_dir_fd")) or self._path(
                target, options.get("dst_dir_fd")
            )
            self._meet({"replace": "rename"}.get(name, name), at)
            return REAL[name](source, target, **options)

        return call

    def _symlink(self, target: Any, path: Any, *args: Any, **options: Any) -> None:
        self._meet("symlink", self._path(path, options.get("dir_fd")))
        REAL["symlink"](target, path, *args, **options)

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        self._meet("create" if flags & os.O_CREAT else "open", self._path(path, dir_fd))
        return REAL["open"](path, flags, mode, dir_fd=dir_fd)

    def _open_file(self, file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        path, reads = self._path(file), mode.strip("bt") == "r"
        if not isinstance(file, int):
            self._meet("open" if reads else "create", path)
        if reads:  # the file object reads by itself, which is not seen
            self._meet("read", path)
        return _REAL_OPEN(file, mode, *args, **options)


METADATA = (*_LOOKS, "open", *_NEW, *_GOES, "rename", "utime")
"""Operations that a metadata server answers."""


class SlowShim(Shim):
    """Slows down every operation of the given kinds on paths below ``root`` that contain ``name``."""

    def __init__(
        self, root: str, *, seconds: float, operations: Sequence[str] = METADATA, name: str = ""
    ) -> None:
        super().__init__(root)
        self._seconds = seconds
        self._slow = frozenset(operations)
        self._name = name

    def _meet(self, op: str, path: str | None) -> None:
        if path is not None and op in self._slow and self._name in path:
            time.sleep(self._seconds)


def strikes_of(operations: list[Operation]) -> list[Strike]:
    """Return every fault at every kind of operation on every path.

    A change fails once, and in another case from then on. A look-up fails once with one errno, and
    permanently with another. If a recording has an operation several times, each later one gets one
    of the faults in turn. One operation of each kind is slow.
    """
    found: list[Strike] = []
    delayed: set[str] = set()
    for number, one in enumerate(dict.fromkeys(operations)):
        faults = [fault for fault in one.faults() if fault != DELAY]
        if one.nth:
            found.append(Strike(one, faults[number % len(faults)], always=False))
            continue
        is_look = one.op in (*_LOOKS, *_READS)
        found += [Strike(one, fault, always=False) for fault in faults if not is_look or fault != "ESTALE"]
        found += [Strike(one, fault, always=True) for fault in faults if not is_look or fault == "ESTALE"]
        if one.op not in delayed:
            delayed.add(one.op)
            found.append(Strike(one, DELAY, always=False))
    return found
