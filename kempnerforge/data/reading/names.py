"""Expand the entries of a ``text`` setting to paths."""

from __future__ import annotations

import fnmatch
import glob
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kempnerforge.config.path_text import unset_variables
from kempnerforge.data.reading import huggingface
from kempnerforge.errors import DataError

PYTHON_STDLIB = "python-stdlib"
"""The entry for the sources of the Python standard library: real text that every machine has."""

STDLIB_LEFT_OUT_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
STDLIB_LEFT_OUT_FILES = ("_sysconfigdata_*.py", "sitecustomize.py", "usercustomize.py")
"""Files that depend on how Python was built or installed. Without them, a Python release gives the
same corpus on every machine."""

ANY_FOLDERS = "**"


@dataclass(frozen=True)
class LeftOut:
    """A file or folder of an entry that is not read."""

    path: Path
    reason: str


def list_entry(entry: str) -> Iterator[Path | LeftOut]:
    """Yield what one entry names, sorted by path. Links are followed, and loops of them end.

    Paths are those of files, or of what is neither a file nor a folder. Files are opened only to tell
    the splits of a dataset.

    Raises :class:`DataError` if there are none, a variable is not set, or a folder cannot be read.
    """
    if entry == PYTHON_STDLIB:
        yield from _stdlib_files()
        return
    has_file = False
    for item in _find(_expand(entry)):
        has_file = has_file or isinstance(item, Path)
        yield item
    if not has_file:
        raise DataError(
            f"text {entry!r} matches no file (searched from {Path.cwd()}). "
            f'Entries are files, folders, globs such as "notes/**/*.md", or "{PYTHON_STDLIB}"'
        )


def _find(pattern: str) -> Iterator[Path | LeftOut]:
    # A name that contains [ or * is taken literally if such a file exists.
    if os.path.isdir(pattern):
        yield from _walk(Path(pattern), set())
    elif os.path.lexists(pattern):
        if not os.path.exists(pattern):
            raise DataError(f"text file {pattern} is a broken symbolic link")
        yield Path(pattern)
    else:
        yield from _match(pattern)


def is_folder(entry: str) -> bool:
    """Return whether ``entry`` is the name of a folder."""
    return entry != PYTHON_STDLIB and os.path.isdir(_expand(entry))


def _expand(entry: str) -> str:
    if os.path.lexists(entry):
        return entry
    if faults := unset_variables(entry, key="data.text"):
        raise DataError(str(faults[0]))
    return os.path.expanduser(os.path.expandvars(entry))


def _match(pattern: str) -> Iterator[Path | LeftOut]:
    """Yield the files that a glob matches. Unlike glob.glob, ``**`` never follows a loop of links."""
    parts = Path(pattern).parts
    if ANY_FOLDERS not in parts:
        for path in sorted(map(Path, glob.glob(pattern))):
            is_read = not os.path.isdir(path)
            yield path if is_read else LeftOut(path, f"folder; to read its files, name it or {path}/**")
        return
    first = parts.index(ANY_FOLDERS)
    base = str(Path(*parts[:first]))
    for folder in sorted(map(Path, glob.glob(base) if first else ["."])):
        if os.path.isdir(folder):
            for item in _walk(folder, set()):
                if _fits(_path_of(item).relative_to(folder).parts, parts[first:]):
                    yield item


def _fits(names: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == ANY_FOLDERS:
        # At the end it matches any file, as in glob.glob.
        return len(patterns) == 1 or any(_fits(names[n:], patterns[1:]) for n in range(len(names)))
    return bool(names) and fnmatch.fnmatchcase(names[0], patterns[0]) and _fits(names[1:], patterns[1:])


def _path_of(item: Path | LeftOut) -> Path:
    return item.path if isinstance(item, LeftOut) else item


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path | LeftOut]:
    """Yield the content of ``folder`` sorted by path, each real folder once, without hidden names."""
    try:
        status = folder.stat()
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise DataError(f"folder {folder}: cannot be read: {error.strerror}") from error
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    reasons = huggingface.left_out(folder, names)
    for name in names:
        path = folder / name
        if name in reasons:
            yield LeftOut(path, reasons[name])
        elif os.path.isdir(path):
            yield from _walk(path, seen)
        else:
            yield path


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
