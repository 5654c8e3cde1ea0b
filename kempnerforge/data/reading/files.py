"""The files that a ``text`` setting names, in a fixed order, and those that are passed over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PYTHON_STDLIB = "python-stdlib"
"""The entry for the sources of the Python standard library: real text that every machine has."""

Format = Literal["text", "jsonl", "parquet", "arrow"]
Compression = Literal["gzip", "zstd"]


@dataclass(frozen=True)
class TextFile:
    """A file to read."""

    path: Path
    format: Format
    compression: Compression | None
    size_bytes: int
    """Size on disk."""
    note: str = ""
    """What the content is, where the name says something else."""


@dataclass(frozen=True)
class PassedOver:
    """A file that is not read."""

    path: Path
    reason: str
    size_bytes: int = 0
    """0 for files that have nothing to read, such as empty ones and those that were already read."""


@dataclass(frozen=True)
class FoundFiles:
    """What a ``text`` setting names."""

    entries: tuple[str, ...]
    files: tuple[TextFile, ...]
    passed_over: tuple[PassedOver, ...]

    @property
    def size_bytes(self) -> int:
        """Size on disk of all files to read."""
        return sum(file.size_bytes for file in self.files)

    def require_text(self) -> None:
        """Raise :class:`DataError` if no file is left, or more than half of the bytes are passed over."""
        raise NotImplementedError


def find_files(text: str | Sequence[str]) -> FoundFiles:
    """Find the files that ``text`` names and look at the first bytes of each."""
    raise NotImplementedError


def files_of(entry: str) -> list[Path]:
    """Return the paths that one entry names, in order, without looking into the files."""
    raise NotImplementedError


def digest_file(path: Path) -> str:
    """Return the xxh3-128 of a file, hexadecimal."""
    raise NotImplementedError
