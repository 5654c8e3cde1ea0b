"""Faults that ranks record, each rank in its own file: ``faults/attempt_00003.rank_00001.txt``.

The first line identifies the writer: attempt, rank, host. An exception is another line of JSON. A
process that ends by SIGSEGV or SIGABRT cannot write one, so ``faulthandler`` dumps its stacks to
the file from C. A file with only the first line records no fault and is removed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from kempnerforge import fsio

FOLDER = "faults"

_NAME = re.compile(r"attempt_(\d+)\.rank_(\d+)\.txt")
_FATAL = re.compile(r"^Fatal Python error: (.*)$", re.MULTILINE)
_PEER_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError")
_PEER_TEXT = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket (closed|timeout)|remote process exited"
    r"|timed out (waiting|after)|timeout waiting|recvValue failed|failed to recv"
    r"|watchdog caught collective operation timeout",
    re.IGNORECASE,
)
_OWN_TEXT = re.compile(
    r"CUDA (error|failure)|ncclUnhandledCudaError|ncclInvalid(Usage|Argument)|shared memory segment"
    r"|out of memory|no space left",
    re.IGNORECASE,
)
"""Texts of NCCL errors whose cause is this rank's own GPU, memory or call."""


@dataclass(frozen=True)
class FaultRecord:
    """A fault that one rank recorded."""

    attempt: int
    rank: int
    host: str
    time: float
    text: str
    """Type and message of the exception, or the signal."""
    by_peer: bool
    """Whether it is only a consequence of the loss of another rank."""
    path: str
    type_name: str = ""
    """Class of the exception; empty for a signal."""


def is_peer_loss(type_name: str, message: str) -> bool:
    """Return whether an exception is a consequence of the loss of another rank.

    It is recognized by exception types of torch.distributed, and by messages of gloo, NCCL, NCCL's
    watchdog and the c10d store. What a hook of the user's raised is never one, whatever it says.
    """
    if type_name == "HookError" or _OWN_TEXT.search(message):
        return False
    return type_name in _PEER_TYPES or _PEER_TEXT.search(message) is not None


class FaultFile:
    """The fault file of this rank, open for ``faulthandler`` until ``close``. Raises OSError.

    Args:
        host: this node's name in SLURM.
        watchdog: whether NCCL's watchdog runs in this process.
    """

    def __init__(self, run_dir: Path, *, attempt: int, rank: int, host: str, watchdog: bool) -> None:
        self.path = _path_of(run_dir, attempt, rank)
        with contextlib.suppress(FileExistsError):  # every rank creates the folder
            fsio.new_folder(self.path.parent)
        head = {"attempt": attempt, "rank": rank, "host": host, "pid": os.getpid(), "watchdog": watchdog}
        self._file: TextIO | None = os.fdopen(fsio.open_file(self.path, os.O_WRONLY | os.O_APPEND), "a")
        self._file.write(json.dumps(head) + "\n")
        self._file.flush()
        faulthandler.enable(file=self._file, all_threads=True)

    def record(self, error: BaseException) -> None:
        """Record an exception durably. Raises OSError."""
        fsio.append_line(self.path, _line_of(error))

    def close(self) -> None:
        """Stop recording. Remove the file if it has no fault."""
        if self._file is None:
            return
        faulthandler.disable()
        file, self._file = self._file, None
        with contextlib.suppress(OSError):  # recorded faults are already on disk
            file.close()
            if _read(self.path) is None:
                self.path.unlink(missing_ok=True)


def record_fault(run_dir: Path, error: BaseException, *, attempt: int, rank: int, host: str) -> None:
    """Record an exception like ``FaultFile.record``, without an open ``FaultFile``. Raises OSError."""
    path = _path_of(run_dir, attempt, rank)
    with contextlib.suppress(FileExistsError):
        fsio.new_folder(path.parent)
    head = {"attempt": attempt, "rank": rank, "host": host, "pid": os.getpid(), "watchdog": False}
    fsio.append_line(path, f"{json.dumps(head)}\n{_line_of(error)}")


def _path_of(run_dir: Path, attempt: int, rank: int) -> Path:
    return run_dir / FOLDER / f"attempt_{attempt:05d}.rank_{rank:05d}.txt"


def _line_of(error: BaseException) -> str:
    name = type(error).__name__
    body = {
        "time": time.time(),
        "type": name,
        "message": str(error),
        "by_peer": is_peer_loss(name, str(error)),
        "traceback": "".join(traceback.format_exception(error)),
    }
    return json.dumps(body)


def read_faults(run_dir: Path) -> list[FaultRecord]:
    """Return all recorded faults of a run, ordered by attempt and time. Raises OSError."""
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return []
    records = [_read(path) for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    faults = [record for record in records if record is not None]
    return sorted(faults, key=lambda fault: (fault.attempt, fault.time, fault.rank))


def remove_empty(run_dir: Path, *, before_attempt: int) -> None:
    """Remove the files of older attempts that have no fault. Only rank 0 calls this. Raises OSError."""
    old = [
        path
        for path in (run_dir / FOLDER).glob("attempt_*.txt")
        if (match := _NAME.fullmatch(path.name)) and int(match[1]) < before_attempt
    ]
    fsio.remove_all([path for path in old if _read(path) is None])


def _read(path: Path) -> FaultRecord | None:
    match = _NAME.fullmatch(path.name)
    try:
        content, changed = fsio.read_mark(path).decode(errors="replace"), path.lstat().st_mtime
    except FileNotFoundError:
        return None
    head, _, rest = content.partition("\n")
    if match is None or not rest.strip():
        return None
    try:
        host, watchdog = str(json.loads(head)["host"]), bool(json.loads(head).get("watchdog"))
    except (ValueError, KeyError, TypeError):
        host, watchdog = "", False
    common = {"attempt": int(match[1]), "rank": int(match[2]), "host": host, "path": str(path)}
    # An exception takes precedence: NCCL's watchdog may abort the process while it is ending.
    for line in rest.splitlines():
        try:
            body = json.loads(line)
            name = str(body["type"])
            return FaultRecord(
                **common,
                time=float(body["time"]),
                text=f"{name}: {body['message']}",
                by_peer=bool(body["by_peer"]),
                type_name=name,
            )
        except (ValueError, KeyError, TypeError):
            continue
    if fatal := _FATAL.search(rest):
        by_peer = watchdog and is_watchdog_abort(rest[fatal.start() :])
        return FaultRecord(**common, time=changed, text=fatal[1], by_peer=by_peer)
    return FaultRecord(**common, time=changed, text=rest.strip().splitlines()[0], by_peer=False)


def is_watchdog_abort(dump: str) -> bool:
    """Return whether a dump of ``faulthandler`` shows an abort on a thread that Python does not know.

    With NCCL this is the watchdog's thread. It aborts the process if a collective failed or timed
    out, which is how the loss of another rank appears. It writes its message to standard error
    only. A CUDA error that the watchdog sees before other code raises it cannot be distinguished
    from such a loss.
    """
    return dump.startswith("Fatal Python error: Aborted") and "Current thread" not in dump
