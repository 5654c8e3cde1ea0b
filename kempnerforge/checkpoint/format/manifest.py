"""``manifest.json``: the last file of a checkpoint to be written, with the digests of all other files."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import re
import stat
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from kempnerforge import fsio
from kempnerforge.checkpoint.format import json_values, paths, structure
from kempnerforge.checkpoint.format.checksums import BLOCK_BYTES, FileRecord, VerifiedFile
from kempnerforge.errors import DamagedCheckpointError, MismatchError, NoTrainingStateError

T = TypeVar("T")

FORMAT = 1
FORMATS = {0: 1, 1: 1.1}
"""Minor version -> value in the manifest. 1.1 adds tags in ``train_state.json``, and ``__paths__``."""
_FORMER_REASONS = {"asked": "requested", "dynamics": "early_window"}


def current_reason(reason: str) -> str:
    """Return why a step was saved in today's words. ``asked`` and ``dynamics`` are deprecated."""
    return _FORMER_REASONS.get(reason, reason)


def confirm_damage(look: Callable[[], T], *, pause_s: float) -> T:
    """Run ``look``, and once more after a pause if it raises DamagedCheckpointError.

    A network file system may not show a file for a moment, and steps are renamed for damage.
    """
    try:
        return look()
    except DamagedCheckpointError:
        time.sleep(pause_s)
        return look()


@dataclass(frozen=True)
class Provenance:
    """What a checkpoint records of the run that wrote it."""

    step: int | None = None
    run_id: str = ""
    attempt: int = 0
    parent_step: int | None = None
    """The committed step that the attempt resumed from; None for a fresh start."""
    reason: str = "requested"
    """Why the step was saved: ``interval``, ``last``, ``stop``, ``requested``."""
    layout: dict[str, int] = field(default_factory=dict)
    """The degree of each kind of parallelism, and ``num_ranks``."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions and hardware that bitwise equality depends on."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of exactly this step, such as ``eval/loss``. Retention ranks steps by them."""
    tokenizer: dict[str, str] = field(default_factory=dict)
    """``digest`` of the tokenizer that made the tokens, the absolute ``path`` of its file, if any,
    the ``separator_id`` after every document, and the ``bos_id`` before it, if any; ``load_path``,
    with whose weights the run began, as an absolute path.
    What is unknown is missing."""


_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_MAX_BYTES = 1 << 28
"""More than any manifest takes: that of a 10 TB checkpoint takes 30 MB."""
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
"""Created once, because a run has thousands of steps."""
_OPTIONAL = ("metrics", "tokenizer")
"""Fields that manifests of earlier versions lack."""


@dataclass(frozen=True)
class Manifest:
    """A parsed manifest with a correct digest."""

    provenance: Provenance
    time: float
    """Seconds since the epoch, at the commit."""
    files: dict[str, FileRecord]

    @property
    def size_bytes(self) -> int:
        """Size of all files that the manifest lists."""
        return sum(record.size_bytes for record in self.files.values())


def needs_minor(train_state: bytes) -> bool:
    """Return whether this ``train_state.json`` needs format 1.1."""
    return json_values.has_new_tags(train_state) or f'"{structure.PATHS}"'.encode() in train_state


def encode(provenance: Provenance, files: dict[str, FileRecord], *, minor: int = 0) -> bytes:
    """Return the bytes of ``manifest.json``.

    Metrics that are not finite are left out: JSON has no such values.
    """
    body: dict[str, Any] = {
        "format": FORMATS[minor],
        **asdict(provenance),
        "metrics": {name: value for name, value in provenance.metrics.items() if math.isfinite(value)},
        "time": time.time(),
        "block_bytes": BLOCK_BYTES,
        "files": {name: record._asdict() for name, record in sorted(files.items())},
    }
    body["digest"] = _digest(body)
    return (json.dumps(body, indent=1) + "\n").encode()


def decode(data: bytes, *, where: str) -> Manifest:
    """Parse and check a manifest. ``where`` is the step's name in errors.

    Raises DamagedCheckpointError, or MismatchError for another format version.
    """
    try:
        body = json.loads(data)
        stated = body.pop("digest")
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(where, f"{paths.MANIFEST} cannot be parsed ({error})") from None
    if stated != _digest(body):
        raise _damaged(where, f"{paths.MANIFEST} does not match its own digest")
    if body.get("format") not in FORMATS.values() or body.get("block_bytes") != BLOCK_BYTES:
        raise MismatchError(_other_format(where, body.get("format")))
    try:
        known = [name for name in Provenance.__dataclass_fields__ if name in body or name not in _OPTIONAL]
        metrics = {str(key): float(value) for key, value in body.get("metrics", {}).items()}
        provenance = Provenance(**{**{name: body[name] for name in known}, "metrics": metrics})
        _check_types(provenance)
        provenance = replace(provenance, reason=current_reason(provenance.reason))
        return Manifest(
            provenance=provenance,
            time=_finite(body["time"]),
            files={
                name: FileRecord(int(record["size_bytes"]), tuple(record["xxh3_128"]))
                for name, record in body["files"].items()
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _damaged(where, f"{paths.MANIFEST} lacks a field ({error!r})") from None


def _other_format(where: str, found: Any) -> str:
    known = " and ".join(map(str, FORMATS.values()))
    newer = isinstance(found, (int, float)) and found > max(FORMATS.values())
    by = ", written by a newer version" if newer else ""
    return (
        f"{where} has checkpoint format {found!r}{by}; this version reads formats {known}. "
        "Use the version that wrote it."
    )


def _check_types(provenance: Provenance) -> None:
    """Raise TypeError for fields of the wrong type. A correct digest does not prove who wrote the file."""
    if not isinstance(provenance.run_id, str) or not isinstance(provenance.reason, str):
        raise TypeError("run_id and reason are text")
    if not isinstance(provenance.layout, dict) or not isinstance(provenance.versions, dict):
        raise TypeError("layout and versions are tables")
    tokenizer = provenance.tokenizer
    if not isinstance(tokenizer, dict) or not all(isinstance(value, str) for value in tokenizer.values()):
        raise TypeError("tokenizer is a table of text")
    numbers = (provenance.step, provenance.parent_step)
    if type(provenance.attempt) is not int or any(n is not None and type(n) is not int for n in numbers):
        raise TypeError("attempt, step and parent_step are whole numbers")


def _finite(value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a time")
    return float(value)


def read(step_folder: Path) -> Manifest:
    """Read the manifest of ``step_folder``. Verify only its own digest.

    Raises DamagedCheckpointError (also for a missing file), MismatchError, OSError.
    """
    return decode(_read_bytes(step_folder), where=step_folder.name)


def _read_bytes(step_folder: Path) -> bytes:
    """Read the manifest with few system calls, because each is a round trip on a network file system."""
    try:
        # Opening a pipe would hang. A link may lead out of the folder.
        fd = os.open(
            f"{step_folder}/{paths.MANIFEST}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        )
    except FileNotFoundError:
        raise _damaged(step_folder.name, f"{paths.MANIFEST} is missing") from None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise
        raise _damaged(step_folder.name, f"{paths.MANIFEST} is not a manifest ({error.strerror})") from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_BYTES:
            raise _damaged(step_folder.name, f"{paths.MANIFEST} is not a manifest ({found.st_size} bytes)")
        data = bytearray(found.st_size)
        return bytes(data[: fsio.read_range(fd, memoryview(data), 0)])
    finally:
        os.close(fd)


def load(step_folder: Path, *, step: int | None = None) -> Manifest:
    """Read the manifest of ``step_folder`` and check file names and sizes, without reading shards.

    With ``step``, it must be that step of a run. Raises DamagedCheckpointError (also for a missing
    file), MismatchError, OSError, and with ``step`` NoTrainingStateError.
    """
    where, folder = step_folder.name, str(step_folder)
    manifest = read(step_folder)
    if step is not None and manifest.provenance.step is None:
        raise NoTrainingStateError(f"{where} holds no training state: its manifest names no step of a run")
    if step is not None and manifest.provenance.step != step:
        raise _damaged(where, f"its manifest is of step {manifest.provenance.step}")
    for name, record in manifest.files.items():
        if not _is_file_name(name):
            raise _damaged(where, f"the manifest names {name!r}, which is not a file of this folder")
        if len(record.xxh3_128) != -(-record.size_bytes // BLOCK_BYTES):
            raise _damaged(where, f"the manifest has too few digests for {name}")
        try:
            found = os.lstat(f"{folder}/{name}")
        except FileNotFoundError:
            raise _damaged(where, f"{name} is missing") from None
        if not stat.S_ISREG(found.st_mode):
            raise _damaged(where, f"{name} is not a regular file")
        if found.st_size != record.size_bytes:
            raise _damaged(where, f"{name} has {found.st_size} of {record.size_bytes} bytes")
    for name in (paths.INDEX, paths.TRAIN_STATE):
        if name not in manifest.files:
            raise _damaged(where, f"the manifest does not list {name}")
    return manifest


@functools.lru_cache(maxsize=10_000)
def _is_file_name(name: str) -> bool:
    """Return whether ``name`` is valid. Cached, because the steps of a run have the same names."""
    return _FILE_NAME.fullmatch(name) is not None


def read_verified(step_folder: Path, manifest: Manifest, name: str) -> bytes:
    """Return all bytes of one of the step's files, verified. Raises DamagedCheckpointError."""
    record = manifest.files.get(name)
    if record is None:
        raise _damaged(step_folder.name, f"the manifest does not list {name}")
    if (data := _read_small(f"{step_folder}/{name}", record)) is not None:
        return data
    with VerifiedFile(step_folder / name, record) as file:
        return file.read(0, record.size_bytes)


def _read_small(path: str, record: FileRecord) -> bytes | None:
    """Return the verified bytes of a file of one block; None if ``VerifiedFile`` has to read the file."""
    if len(record.xxh3_128) != 1:
        return None
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(fd, record.size_bytes)
    finally:
        os.close(fd)
    return data if xxhash.xxh3_128_hexdigest(data) == record.xxh3_128[0] else None


def _digest(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(_CANONICAL.encode(body).encode())


def _damaged(where: str, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(f"{where} is damaged: {what}")
