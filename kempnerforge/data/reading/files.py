"""The files that a ``text`` setting names, in a fixed order, and those that are passed over.

Files are in the order of the setting and sorted by path within each entry, and each real file is
used once, so that the same tree gives the same tokens on every machine.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from kempnerforge.data.reading.heads import Format, NotText, inspect_head
from kempnerforge.data.reading.names import PYTHON_STDLIB, LeftOut, is_folder, list_entry
from kempnerforge.data.reading.pieces import first_invalid_byte
from kempnerforge.data.reading.splits import split_notes
from kempnerforge.data.reading.streams import BLOCK_BYTES, Compression, open_file, storage_errors
from kempnerforge.errors import DataError

NAMED_AT_MOST = 3
"""Files that a message about many of them names."""


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file to read, as it was when it was found."""

    name: str
    """Its path. There may be a million files, and a Path takes three times the memory."""
    format: Format
    compression: Compression | None
    size_bytes: int
    """Size on disk."""
    mtime_ns: int
    """With the size it tells whether the file has changed."""
    note: str = ""
    """What the content is, where the name says something else, or records may be meant."""

    @property
    def path(self) -> Path:
        """Path of the file."""
        return Path(self.name)


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A file or folder that is not read."""

    name: str
    """Its path."""
    reason: str
    size_bytes: int = 0
    """0 where nothing is lost, such as for files that were already read."""

    @property
    def path(self) -> Path:
        """Path of the file or folder."""
        return Path(self.name)


@dataclass(frozen=True)
class FoundFiles:
    """What a ``text`` setting names."""

    entries: tuple[str, ...]
    files: tuple[TextFile, ...]
    passed_over: tuple[PassedOver, ...]
    notes: tuple[str, ...] = ()
    """What is read that may not be meant."""

    @property
    def size_bytes(self) -> int:
        """Size on disk of all files to read."""
        return sum(file.size_bytes for file in self.files)

    def require_text(self) -> None:
        """Raise :class:`DataError` if no file is left, or more than half of the bytes are passed over."""
        if not self.files:
            raise DataError(f"no text in {', '.join(self.entries)}: {_named(self.passed_over)}")
        lost = sorted(
            (item for item in self.passed_over if item.size_bytes), key=lambda item: -item.size_bytes
        )
        lost_bytes = sum(item.size_bytes for item in lost)
        if lost_bytes > self.size_bytes:
            raise DataError(
                f"most of {', '.join(self.entries)} cannot be read: {_size(lost_bytes)} of "
                f"{_size(lost_bytes + self.size_bytes)}, {_named(lost)}; "
                'name only what is to be read, such as "notes/**/*.md"'
            )


def find_files(text: str | Sequence[str], found_bytes: Callable[[int], None] = lambda _: None) -> FoundFiles:
    """Find the files that ``text`` names, and look at the first bytes of each.

    Entries are ``"python-stdlib"``, files, folders or globs. ``~``, ``$VAR`` and ``**`` are expanded.
    A folder means all files in it except hidden ones. Links are followed. ``found_bytes`` is called with
    the size of each file to read.

    Raises :class:`DataError` if an entry matches nothing, a variable is not set, or a file or folder
    cannot be read. See ``FoundFiles.require_text`` for what is passed over.
    """
    entries = (text,) if isinstance(text, str) else tuple(text)
    if not entries:
        raise DataError(f'no text was given; give files, globs, or "{PYTHON_STDLIB}"')
    files: list[TextFile] = []
    passed_over: list[PassedOver] = []
    first_names: dict[tuple[int, int | str], str] = {}
    notes: list[str] = []
    for entry in entries:
        first_of_entry = len(files)
        for item in list_entry(entry):
            found = (
                PassedOver(str(item.path), item.reason)
                if isinstance(item, LeftOut)
                else _inspect(item, first_names, is_stdlib=entry == PYTHON_STDLIB)
            )
            if isinstance(found, TextFile):
                files.append(found)
                found_bytes(found.size_bytes)
            elif found is not None:
                passed_over.append(found)
        of_entry = itertools.islice(files, first_of_entry, None)
        records = (file.path for file in of_entry if file.format != "text")
        notes += split_notes(records, of_folder=is_folder(entry))
    return FoundFiles(entries, tuple(files), tuple(passed_over), tuple(notes))


def files_of(entry: str) -> list[Path]:
    """Return the paths that one entry names, in order, without opening the files.

    Raises :class:`DataError` as ``find_files`` does.
    """
    return [item for item in list_entry(entry) if isinstance(item, Path)]


def is_broken_link(path: Path) -> bool:
    """Return whether ``path`` is a link to what does not exist, or to itself."""
    return path.is_symlink() and not os.path.exists(path)


def digest_file(path: Path, read_bytes: Callable[[int], None] = lambda _: None) -> bytes:
    """Return the xxh3-128 of a file. Calls ``read_bytes`` with the size of each block.

    Raises :class:`DataError` if the file cannot be read.
    """
    digest = xxhash.xxh3_128()
    with storage_errors(path), open_file(path) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            read_bytes(len(block))
    return digest.digest()


def _inspect(
    path: Path, first_names: dict[tuple[int, int | str], str], *, is_stdlib: bool
) -> TextFile | PassedOver | None:
    """Return what ``path`` is, or None if this very path was met before."""
    name = str(path)
    with storage_errors(path):
        if is_broken_link(path):
            return PassedOver(name, "broken link")
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        return PassedOver(name, "not a regular file")
    # Some file systems have no inode numbers.
    identity = (status.st_dev, status.st_ino or str(path.resolve()))
    if identity in first_names:
        first = first_names[identity]
        return PassedOver(name, f"already read as {first}") if first != name else None
    first_names[identity] = name
    head = inspect_head(path)
    if is_stdlib and not isinstance(head, NotText) and not _is_utf8(path):
        head = NotText("not UTF-8")
    if isinstance(head, NotText):
        return PassedOver(name, head.reason, 0 if is_stdlib else status.st_size)
    return TextFile(name, head.format, head.compression, status.st_size, status.st_mtime_ns, head.note)


def _is_utf8(path: Path) -> bool:
    # The files of the standard library are small.
    with storage_errors(path), open_file(path) as file:
        return first_invalid_byte(file.read()) is None


def _named(items: Sequence[PassedOver]) -> str:
    names = [f"{item.name} ({item.reason})" for item in items[:NAMED_AT_MOST]]
    more = f" and {len(items) - NAMED_AT_MOST} more" if len(items) > NAMED_AT_MOST else ""
    return ", ".join(names) + more


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
