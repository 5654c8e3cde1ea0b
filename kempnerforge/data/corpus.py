"""The files that a ``text`` setting names, and their content.

A document is one file. Files are in the order of the setting and sorted by path within each entry,
and each file is used once, so that the same tree gives the same tokens on every machine.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from kempnerforge.errors import DataError

PYTHON_STDLIB = "python-stdlib"
"""The entry for the sources of the Python standard library: real text that every machine has."""

STDLIB_LEFT_OUT_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
STDLIB_LEFT_OUT_FILES = ("_sysconfigdata_*.py", "sitecustomize.py", "usercustomize.py")
"""Files that depend on how Python was built or installed. Without them, a Python release gives the
same corpus on every machine."""

BINARY_PROBE_BYTES = 8000
"""A file with a NUL in its first 8,000 bytes is binary, as in git."""


@dataclass(frozen=True)
class Document:
    """One text file, as it was when it was scanned."""

    path: Path
    size_bytes: int
    digest: str
    """xxh3-128 of its bytes, hexadecimal."""


@dataclass(frozen=True)
class Corpus:
    """The documents that a ``text`` setting names."""

    documents: tuple[Document, ...]
    num_empty: int
    """Empty files, which were skipped."""
    num_binary: int
    """Files that are not text, which were skipped."""

    @property
    def size_bytes(self) -> int:
        """Total size of all documents."""
        return sum(document.size_bytes for document in self.documents)


def scan_corpus(text: str | Sequence[str]) -> Corpus:
    """Find and read every file that ``text`` names: entries are ``"python-stdlib"``, files, folders or globs.

    ``~`` and ``**`` are expanded. A folder means all files in it except hidden ones. Empty and
    binary files are skipped and counted.

    Raises :class:`DataError` if an entry matches nothing, a file cannot be read, or no text
    remains.
    """
    entries = [text] if isinstance(text, str) else list(text)
    if not entries:
        raise DataError(f'no text was given; give files, globs, or "{PYTHON_STDLIB}"')
    files = dict.fromkeys(path for entry in entries for path in files_of(entry))
    documents: list[Document] = []
    num_empty = num_binary = 0
    for path in files:
        content = read_file(path)
        if not content:
            num_empty += 1
        elif b"\0" in content[:BINARY_PROBE_BYTES]:
            num_binary += 1
        else:
            documents.append(Document(path, len(content), xxhash.xxh3_128_hexdigest(content)))
    if not documents:
        raise DataError(
            f"no text in {', '.join(entries)}: {len(files)} files, {num_empty} of them empty "
            f"and {num_binary} binary"
        )
    return Corpus(tuple(documents), num_empty, num_binary)


def read_file(path: Path) -> bytes:
    """Return the bytes of a text file. Raises :class:`DataError` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"text file {path}: cannot be read: {error.strerror}") from error


def read_document(document: Document) -> bytes:
    """Return the bytes of ``document``. Raises :class:`DataError` if they changed since the scan."""
    content = read_file(document.path)
    if xxhash.xxh3_128_hexdigest(content) != document.digest:
        raise DataError(f"text file {document.path} changed while it was being prepared; start again")
    return content


def files_of(entry: str) -> list[Path]:
    """Return the files that one entry names, sorted by path. Raises :class:`DataError` if there are none."""
    if entry == PYTHON_STDLIB:
        return _stdlib_files()
    pattern = os.path.expanduser(entry)
    # A name that contains [ or * is taken literally if such a file exists.
    matches = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)
    is_pattern = matches != [pattern]
    files: set[Path] = set()
    for match in matches:
        path = Path(match)
        if path.is_file():
            files.add(path)
        elif path.is_dir() and not is_pattern:
            files.update(_files_below(path))
        elif not path.exists():
            raise DataError(f"text file {path} is a broken symbolic link")
    if not files:
        raise DataError(
            f"text {entry!r} matches no file (searched from {Path.cwd()}). "
            f'Entries are files, folders, globs such as "notes/**/*.md", or "{PYTHON_STDLIB}"'
        )
    return sorted(files)


def _files_below(folder: Path) -> list[Path]:
    paths: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(parent, name) for name in names if not name.startswith(".")]
    return [path for path in paths if path.is_file()]


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths: list[Path] = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_LEFT_OUT_FOLDERS]
        paths += [Path(parent, name) for name in names if name.endswith(".py")]
    kept = [path for path in paths if path.is_file() and not _left_out(path.name)]
    if not kept:
        raise DataError(f"{PYTHON_STDLIB}: this Python has no sources in {root}; name text files instead")
    return sorted(kept)


def _left_out(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in STDLIB_LEFT_OUT_FILES)
