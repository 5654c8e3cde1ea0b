"""What the offline attempts of a run have brought to disk for wandb: a folder each, ``wandb/offline-run-*``.

A kill loses what the client had not written yet: the newest step, which it keeps open, and what it was
handed in the last half second. wandb takes no step below its newest one, so an attempt that holds back all
steps that were logged before would leave a hole there. It asks here what is on disk instead.

A fragment's ``.wandb`` file is a log in LevelDB's format after a header of 7 bytes; its records are wandb's
protocol buffers. A log that ends within a record ends at the record before it, as for ``wandb sync``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from kempnerforge import fsio

_MARK = "kempnerforge.json"
"""In a fragment's folder, where wandb neither reads nor uploads it: which attempt wrote it."""
_BLOCK_BYTES = 32 << 10
_HEADER_BYTES = 7
_WHOLE, _FIRST, _LAST = 1, 2, 4


def mark(fragment: Path, attempt: int) -> None:
    """Say in ``fragment`` which attempt writes it. Raises OSError."""
    fsio.write_new_file(fragment / _MARK, json.dumps({"attempt": attempt}).encode())


def first_missing_step(run_dir: Path, run_id: str, attempt: int, newest_steps: Mapping[int, int]) -> int:
    """One above the newest step that attempts before ``attempt`` have brought to disk, or may have uploaded.

    ``newest_steps``: attempt -> the newest step that it logged. It counts for attempts without a fragment:
    online ones, and those whose fragment was uploaded and removed.

    Raises OSError, ValueError, ImportError where the files are not as this version of wandb writes them.
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
    """The highest step of which ``path`` has a row; -1 without rows."""
    from wandb.proto import wandb_internal_pb2

    newest, messages = -1, cast(Any, wandb_internal_pb2)  # its classes are made when it is imported
    for data in _log_records(fsio.read_file(path)):
        record = messages.Record.FromString(data)
        if record.HasField("history"):
            newest = max(newest, record.history.step.num)
    return newest


def _log_records(log: bytes) -> Iterator[bytes]:
    if log[:4] != b":W&B":
        raise ValueError("not a log of wandb")
    at, record = _HEADER_BYTES, b""
    while at + _HEADER_BYTES <= len(log):
        left = _BLOCK_BYTES - at % _BLOCK_BYTES
        if left < _HEADER_BYTES:  # too little for a header: it was filled with zeros
            at += left
            continue
        size, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        begin, at = at + _HEADER_BYTES, at + _HEADER_BYTES + size
        if kind == 0 or at > len(log):
            return
        record = log[begin:at] if kind in (_WHOLE, _FIRST) else record + log[begin:at]
        if kind in (_WHOLE, _LAST):
            yield record
