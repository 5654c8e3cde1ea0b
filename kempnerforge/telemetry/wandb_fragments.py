"""Read the wandb files of offline attempts: one folder per attempt, ``wandb/offline-run-*``.

A kill loses what the wandb client has not written yet: the newest step, which it keeps open, and
the rows of the last half second. wandb accepts no step below its newest one. If an attempt skipped
all steps that earlier attempts logged, the lost steps would be missing. Therefore an attempt uses
this module to find out which steps are on disk.

The ``.wandb`` file of a fragment is a log in LevelDB's format after a header of 7 bytes. Its
records are wandb's protocol buffers. A partial record at the end of a log is ignored, as
``wandb sync`` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from kempnerforge import fsio

_MARK = "kempnerforge.json"
"""File in a fragment's folder with the attempt that wrote it. wandb neither reads nor uploads it."""
_BLOCK_BYTES = 32 << 10
_HEADER_BYTES = 7
_WHOLE, _FIRST, _LAST = 1, 2, 4


def mark(fragment: Path, attempt: int) -> None:
    """Record in ``fragment`` which attempt writes it. Raises OSError."""
    fsio.write_new_file(fragment / _MARK, json.dumps({"attempt": attempt}).encode())


def first_missing_step(run_dir: Path, run_id: str, attempt: int, newest_steps: Mapping[int, int]) -> int:
    """Return 1 + the newest step that attempts before ``attempt`` wrote to disk or may have uploaded.

    ``newest_steps`` maps an attempt to the newest step that it logged. It is used for attempts
    without a fragment: online attempts, and those whose fragment was uploaded and removed.

    Raises OSError, ValueError or ImportError if the files differ from those of this version of
    wandb.
    """
    newest, known = -1, {attempt}
    for fragment in sorted(Path(run_dir, "wandb").glob(f"offline-run-*-{run_id}"), reverse=True):
        if not (fragment / _MARK).is_file():
            continue
        writer = json.loads(fsio.read_file(fragment / _MARK))["attempt"]
        if writer < attempt:
            known.add(writer)
            if newest < 0:  # older fragments have lower steps
                newest = _newest_step(fragment / f"run-{run_id}.wandb")
    return max([newest, *(step for writer, step in newest_steps.items() if writer not in known)]) + 1


def _newest_step(path: Path) -> int:
    """Return the highest step with a row in ``path``; -1 without rows."""
    from wandb.proto import wandb_internal_pb2

    newest, messages = -1, cast(Any, wandb_internal_pb2)  # its classes are created at import time
    for data in _log_records(fsio.read_file(path)):
        record = messages.Record.FromString(data)
        if record.HasField("history"):
            newest = max(newest, record.history.step.num)
    return newest


def _log_records(log: bytes) -> Iterator[bytes]:
    if log[:4] != b":W&B":
        raise ValueError("not a wandb log")
    at, record = _HEADER_BYTES, b""
    while at + _HEADER_BYTES <= len(log):
        left = _BLOCK_BYTES - at % _BLOCK_BYTES
        if left < _HEADER_BYTES:  # too small for a header: padding
            at += left
            continue
        size, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        begin, at = at + _HEADER_BYTES, at + _HEADER_BYTES + size
        if kind == 0 or at > len(log):
            return
        record = log[begin:at] if kind in (_WHOLE, _FIRST) else record + log[begin:at]
        if kind in (_WHOLE, _LAST):
            yield record
