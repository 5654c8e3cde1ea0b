"""Records every change that this process makes in one folder, and can let each operation fail.

All watched processes write to one log. They share a lock for each operation, so that the log has
the one order in which the operations happened. ``file_operations.py`` puts a ``Watcher`` between a
process and its file system.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import json
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROLE_BYTES, KIND_BYTES = 16, 16
_CONTROL = struct.Struct(f"<QqqQd{KIND_BYTES}s{ROLE_BYTES}s")

WRITES = ("write", "pwrite")
_TAKES_SPACE = ("create", "mkdir", "write", "pwrite", "symlink", "link", "rename", "fsync")
_APPLIES = {
    "ENOSPC": _TAKES_SPACE,
    "short": WRITES,
    "short_aligned": WRITES,
    "kill_half": WRITES,
    "late_EIO": ("fsync", "rename"),
}
"""The operations that a kind of fault can hit; any operation for other kinds. ``late_EIO`` fails
after the operation was done."""

REAL = {name: getattr(os, name) for name in dir(os) if callable(getattr(os, name))}
"""The original functions of ``os``."""


@dataclass(frozen=True)
class Watch:
    """The folder to watch, and the role of this process."""

    root: str
    """Absolute path without symbolic links."""
    log: str
    control: str
    """File through which a test arms faults. It must exist."""
    role: str
    """``rank0``, or ``writer0`` for the writer that this rank starts."""
    no_direct: bool = False
    """Whether to refuse O_DIRECT after creating the file, as some file systems do."""


class Control:
    """Arms one fault in all watched processes.

    It hits the ``nth`` operation of ``role`` and later ones, until ``count`` operations were hit.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._serial = 0
        if not path.exists():
            path.write_bytes(_CONTROL.pack(0, 0, 0, 0, 0.0, b"", b""))
        self._serial = _CONTROL.unpack(path.read_bytes())[0]

    def arm(self, role: str, nth: int, kind: str, *, count: int = 1, value: float = 0.0) -> None:
        """Arm a fault and forget the one before. ``value`` is the duration of a ``delay`` in seconds."""
        self._serial += 1
        fields = (self._serial, nth, count, 0, value, kind.encode(), role.encode())
        self._path.write_bytes(_CONTROL.pack(*fields))

    def disarm(self) -> None:
        """Remove the fault."""
        self.arm("", 0, "")

    @property
    def fired(self) -> int:
        """Number of operations that the armed fault has hit."""
        return _CONTROL.unpack(self._path.read_bytes())[3]


@dataclass
class Fault:
    kind: str
    value: float


class Watcher:
    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self._lock = threading.RLock()
        self.inside = threading.local()
        self._log_fd = REAL["open"](watch.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        self._control_fd = REAL["open"](watch.control, os.O_RDWR | os.O_CLOEXEC)
        self._serial = -1
        self._seen = 0

    def relative(self, path: Any, dir_fd: int | None = None) -> str | None:
        """Return ``path`` relative to the root; None if it is not below the root."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return None
        text = os.fsdecode(path)
        if dir_fd is not None and not os.path.isabs(text):
            text = os.path.join(REAL["readlink"](f"/proc/self/fd/{dir_fd}"), text)
        text = os.path.abspath(text)
        if text == self.watch.root:
            return "."
        return os.path.relpath(text, self.watch.root) if text.startswith(self.watch.root + "/") else None

    def of_fd(self, fd: Any) -> str | None:
        """Return the path of a descriptor, relative to the root; None if it is elsewhere or unlinked."""
        with contextlib.suppress(OSError, TypeError):
            text = REAL["readlink"](f"/proc/self/fd/{int(fd)}")
            if not text.endswith(" (deleted)"):
                return self.relative(text)
        return None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Let no other process or thread do a watched operation while the block runs."""
        with self._lock:
            fcntl.flock(self._log_fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._log_fd, fcntl.LOCK_UN)

    def log(self, op: str, path: str, *, data: bytes | None = None, **more: Any) -> None:
        """Add a line to the log."""
        entry = {"role": self.watch.role, "op": op, "path": path, **more}
        if data is not None:
            entry["data"] = base64.b64encode(data).decode()
        REAL["write"](self._log_fd, json.dumps(entry).encode() + b"\n")

    def fault(self, op: str) -> Fault | None:
        """Return the fault that hits this operation, and count it as fired."""
        with self.turn():
            fields = _CONTROL.unpack(REAL["pread"](self._control_fd, _CONTROL.size, 0))
            serial, nth, count, fired, value, kind, role = fields
            if serial != self._serial:
                self._serial, self._seen = serial, 0
            if role.rstrip(b"\0").decode() != self.watch.role:
                return None
            number, self._seen = self._seen, self._seen + 1
            name = kind.rstrip(b"\0").decode()
            if number < nth or fired >= count or op not in _APPLIES.get(name, (op,)):
                return None
            fields = (serial, nth, count, fired + 1, value, kind, role)
            REAL["pwrite"](self._control_fd, _CONTROL.pack(*fields), 0)
            return Fault(name, value)

    def perform(self, op: str, path: str, work: Callable[[], Any], **details: Any) -> Any:
        """Do one operation under the lock, with the fault that is due. Log it if it succeeds."""
        fault = self.fault(op)
        if fault is not None:
            self._strike(fault, op, path)
        with self.turn():
            self.inside.depth = getattr(self.inside, "depth", 0) + 1
            try:
                result = work()
            except OSError:
                self.log(op, path, done=False)
                raise
            finally:
                self.inside.depth -= 1
            self.log(op, path, **details)
        if fault is not None and fault.kind == "late_EIO":
            raise OSError(errno.EIO, f"{os.strerror(errno.EIO)} (after {op})", path)
        return result

    def write(self, op: str, fd: int, data: Any, offset: int | None) -> int:
        """Write, possibly only a part, and log the written bytes and their position."""
        path = self.of_fd(fd)
        assert path is not None
        fault = self.fault(op)
        view = memoryview(data).cast("B")
        if fault is not None:
            self._strike(fault, op, path)
            if fault.kind == "short_aligned":
                view = view[: max(4096, view.nbytes // 2 // 4096 * 4096)]
            elif fault.kind in ("short", "kill_half"):
                view = view[: max(1, view.nbytes // 3)]
        with self.turn():
            with _any_size(fd, view.nbytes % 4096 != 0):
                written = REAL["write"](fd, view) if offset is None else REAL["pwrite"](fd, view, offset)
            begin = os.lseek(fd, 0, os.SEEK_CUR) - written if offset is None else offset
            self.log(op, path, data=bytes(view[:written]), offset=begin)
        if fault is not None and fault.kind == "kill_half":
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    def _strike(self, fault: Fault, op: str, path: str) -> None:
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "kill_parent":
            os.kill(os.getppid(), signal.SIGKILL)
        elif fault.kind == "stop":
            # Sent to this thread, because a signal to the process might stop another thread first,
            # while this one continues and takes a lock.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        elif fault.kind == "delay":
            time.sleep(fault.value)
        elif fault.kind in ("ENOSPC", "EIO"):
            number = getattr(errno, fault.kind)
            raise OSError(number, f"{os.strerror(number)} (made by a test at {op})", path)


@contextlib.contextmanager
def _any_size(fd: int, odd: bool) -> Iterator[None]:
    """Let a direct descriptor take one write of a size that direct writes refuse."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if odd and flags & os.O_DIRECT:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        yield
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    else:
        yield
