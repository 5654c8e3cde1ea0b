"""Parts: the tokens of a few units, written by one process and assembled into shards by another.

A part is a folder::

    part.json        what the units of the part have; its presence and its name mean it is complete
    ids              raw little-endian token ids
    documents        DOCUMENT for each document, in order
    counted          only if the encoder has it: uint8 [tokens]

It is written under a name of its own and renamed when it is durable, so a part is complete whatever
was killed. Its bytes depend on the text and the encoder alone. Several processes may therefore write
the same part at once: the first one to rename it wins.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kempnerforge.data.encoding import Batch, Encoder, Notice, Result, SeparatorSeen
from kempnerforge.data.index import NAMED_LEFT_OUT, kind_of
from kempnerforge.data.reading.files import TextFile
from kempnerforge.data.reading.items import Unreadable
from kempnerforge.data.reading.locations import Location
from kempnerforge.data.reading.units import Unit
from kempnerforge.data.tokenizer import token_dtype
from kempnerforge.errors import DataError
from kempnerforge.fsio import new_folder, open_file, publish, write_all, write_new_file

PART_NAME = "part.json"
PART_FORMAT = 2
"""Of ``part.json``. Parts of another format are not used."""

IDS, DOCUMENTS, COUNTED = "ids", "documents", "counted"
DOCUMENT = np.dtype([("tokens", "<u8"), ("bytes", "<u8"), ("digest", "<u8")])
"""Tokens (BOS and separator included), bytes of text, and the first 64 bits of its xxh3-128."""

BUFFER_BYTES = 1 << 20
REPORT_BYTES = 1 << 18
CHUNK_DOCUMENTS = 1 << 16
BLOCK_TOKENS = 1 << 20
"""Documents and tokens that are in memory at a time."""

Report = Callable[[int, int], None]
"""Called with the bytes of text and the tokens that were written since the last call."""

EncodeAll = Callable[[Iterator[Batch]], Iterator[Result]]
"""Encodes batches, and yields the results in their order."""


@dataclass(frozen=True, slots=True)
class Task:
    """The units of one part."""

    number: int
    units: tuple[Unit, ...]
    size_bytes: int
    """Bytes on disk of all units."""

    @property
    def name(self) -> str:
        """Name of the part's folder."""
        return f"part_{self.number:06d}"


@dataclass(slots=True)
class UnitTotals:
    """What was read of one unit."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    first_digest: int = 0
    """First 64 bits of the xxh3-128 of its first document."""


@dataclass
class Part:
    """The content of ``part.json``."""

    units: list[UnitTotals] = field(default_factory=list)
    unreadable: dict[str, int] = field(default_factory=dict)
    """Kind of reason -> number."""
    first_unreadable: list[tuple[Location, str]] = field(default_factory=list)
    """(location, reason) of the first ``NAMED_LEFT_OUT``."""
    separators: dict[str, str] = field(default_factory=dict)
    """Known separator that a text file contains -> the first such file."""
    notices: dict[str, tuple[Location, str]] = field(default_factory=dict)
    """What a notice is about -> location and text of the first one."""

    @classmethod
    def read(cls, folder: Path) -> Part:
        """Read ``part.json`` of a complete part. Raises OSError."""
        content = json.loads((folder / PART_NAME).read_text(encoding="utf-8"))
        units = [UnitTotals(**unit) for unit in content.pop("units")]
        first = [(_location(where), reason) for where, reason in content.pop("first_unreadable")]
        notices = {about: (_location(where), text) for about, (where, text) in content.pop("notices").items()}
        return cls(units=units, first_unreadable=first, notices=notices, **content)


def _location(content: dict[str, Any]) -> Location:
    return Location(Path(content["path"]), content["line"], content["first_byte"])


def write_part(
    task: Task, encoder: Encoder, parts: Path, report: Report, *, encode: EncodeAll | None = None
) -> None:
    """Tokenize the units of ``task`` into the folder ``parts / task.name``.

    ``encode`` encodes the batches of a unit that has more than one. None: in this process.

    Raises :class:`DataError` for text that cannot be read, and OSError if the part cannot be written.
    """
    temporary = parts / f".{task.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp"
    new_folder(temporary)
    writer = _PartWriter(temporary, encoder)
    try:
        for unit in task.units:
            _check_unchanged(unit.file)
            batches = encoder.read(unit)
            first = [*itertools.islice(batches, 2)]
            encode_all = encode if encode and len(first) > 1 else partial(_encode_here, encoder)
            results = encode_all(itertools.chain(first, batches))
            _write_unit(results, writer, report)
            _check_unchanged(unit.file)
        writer.close()
        try:
            publish(temporary, parts / task.name)
        except OSError:
            if not (parts / task.name / PART_NAME).is_file():
                raise
    finally:
        writer.abandon()
        shutil.rmtree(temporary, ignore_errors=True)


def _encode_here(encoder: Encoder, batches: Iterator[Batch]) -> Iterator[Result]:
    for batch in batches:
        yield from encoder.encode(batch)


def _check_unchanged(file: TextFile) -> None:
    try:
        status = file.path.stat()
    except OSError as error:
        raise DataError(f"text file {file.path}: cannot be read: {error.strerror}") from error
    if (status.st_size, status.st_mtime_ns) != (file.size_bytes, file.mtime_ns):
        raise DataError(f"text file {file.path} changed while it was being prepared; start again")


def _write_unit(results: Iterable[Result], writer: _PartWriter, report: Report) -> None:
    writer.begin_unit()
    read_bytes = num_tokens = 0
    for item in results:
        if isinstance(item, Unreadable):
            writer.drop_document()
            kind = kind_of(item.reason)
            writer.part.unreadable[kind] = writer.part.unreadable.get(kind, 0) + 1
            if len(writer.part.first_unreadable) < NAMED_LEFT_OUT:
                writer.part.first_unreadable.append((item.location, item.reason))
        elif isinstance(item, SeparatorSeen):
            writer.part.separators.setdefault(item.separator, str(item.path))
        elif isinstance(item, Notice):
            writer.part.notices.setdefault(item.about, (item.location, item.text))
        else:
            writer.add(item.ids, item.counted, item.content)
            if item.ends_document:
                writer.end_document()
            read_bytes += len(item.content)
            num_tokens += item.ids.size
            if read_bytes >= REPORT_BYTES:
                report(read_bytes, num_tokens)
                read_bytes = num_tokens = 0
    report(read_bytes, num_tokens)


class _PartWriter:
    """The open files of a part."""

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        self.part = Part()
        self._folder = folder
        self._dtype = token_dtype(encoder.tokenizer.vocab_size)
        self._files = {IDS: _Buffered(folder / IDS), DOCUMENTS: _Buffered(folder / DOCUMENTS)}
        if encoder.has_counted:
            self._files[COUNTED] = _Buffered(folder / COUNTED)
        self._begin_document()

    def begin_unit(self) -> None:
        self.part.units.append(UnitTotals())

    def _begin_document(self) -> None:
        self._tokens = self._bytes = 0
        self._digest = xxhash.xxh3_128()

    def add(self, ids: np.ndarray, counted: np.ndarray | None, content: bytes) -> None:
        self._files[IDS].write(ids.astype(self._dtype, copy=False))
        if counted is not None:
            self._files[COUNTED].write(counted.astype(np.uint8))
        self._tokens += ids.size
        self._bytes += len(content)
        self._digest.update(content)

    def end_document(self) -> None:
        digest = self._digest.intdigest() >> 64
        self._files[DOCUMENTS].write(np.array([(self._tokens, self._bytes, digest)], dtype=DOCUMENT))
        totals = self.part.units[-1]
        if not totals.documents:
            totals.first_digest = digest
        totals.documents += 1
        totals.tokens += self._tokens
        totals.text_bytes += self._bytes
        self._begin_document()

    def drop_document(self) -> None:
        """Remove what was added since the last end of a document."""
        self._files[IDS].drop(self._tokens * self._dtype.itemsize)
        if COUNTED in self._files:
            self._files[COUNTED].drop(self._tokens)
        self._begin_document()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        write_new_file(self._folder / PART_NAME, json.dumps(asdict(self.part), default=str).encode())

    def abandon(self) -> None:
        for file in self._files.values():
            file.abandon()


class _Buffered:
    """A new file that is written in large blocks."""

    def __init__(self, path: Path) -> None:
        self._fd = open_file(path, os.O_WRONLY | os.O_EXCL)
        self._buffer = bytearray()

    def write(self, values: np.ndarray) -> None:
        self._buffer += np.ascontiguousarray(values).data.cast("B") if values.size else b""
        if len(self._buffer) >= BUFFER_BYTES:
            self._flush()

    def drop(self, size_bytes: int) -> None:
        """Remove the last ``size_bytes``."""
        self._flush()
        end = os.lseek(self._fd, -size_bytes, os.SEEK_CUR)
        os.ftruncate(self._fd, end)

    def _flush(self) -> None:
        write_all(self._fd, bytes(self._buffer))
        self._buffer.clear()

    def close(self) -> None:
        self._flush()
        os.fsync(self._fd)
        self.abandon()

    def abandon(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class PartReader:
    """Reads a complete part in pieces, so that memory does not depend on its size.

    Raises OSError if the part is gone.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any], *, has_counted: bool) -> None:
        self.part = Part.read(folder)
        self._documents = folder / DOCUMENTS
        self._ids = folder / IDS
        self._counted = folder / COUNTED if has_counted else None
        self._dtype = dtype

    def documents(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield documents, DOCUMENT [documents], and the position of the unit of each in the part."""
        units = np.array([unit.documents for unit in self.part.units])
        ends = np.cumsum(units)
        for first in range(0, int(ends[-1]) if ends.size else 0, CHUNK_DOCUMENTS):
            offset = first * DOCUMENT.itemsize
            chunk = np.fromfile(self._documents, dtype=DOCUMENT, count=CHUNK_DOCUMENTS, offset=offset)
            yield chunk, np.searchsorted(ends, np.arange(first, first + chunk.size), side="right")

    def tokens(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yield the ids from ``start`` to ``stop`` of the part, and which of them count, in blocks."""
        for first in range(start, stop, BLOCK_TOKENS):
            count = min(BLOCK_TOKENS, stop - first)
            ids = np.fromfile(self._ids, self._dtype, count, offset=first * self._dtype.itemsize)
            counted = self._counted and np.fromfile(self._counted, np.uint8, count, offset=first)
            yield ids, counted


def make_tasks(units: Iterable[Unit], task_bytes: int, task_units: int) -> Iterator[Task]:
    """Group neighbouring units into tasks of about ``task_bytes``, whatever the machine.

    A task has at most ``task_units``, so that what is kept of each unit of a part does not need much memory.
    """
    numbers = itertools.count()
    group: list[Unit] = []
    size_bytes = 0
    for unit in units:
        if group and (size_bytes >= task_bytes or len(group) == task_units):
            yield Task(next(numbers), tuple(group), size_bytes)
            group, size_bytes = [], 0
        group.append(unit)
        size_bytes += unit.size_bytes
    if group:
        yield Task(next(numbers), tuple(group), size_bytes)
