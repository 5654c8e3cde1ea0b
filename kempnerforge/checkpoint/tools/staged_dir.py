"""Create a folder that appears only when it is complete: fill a hidden one beside it, then rename it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from kempnerforge import fsio
from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.retention import disk_space
from kempnerforge.checkpoint.retention.quota import read_quotas
from kempnerforge.errors import NoSpaceError, RunFolderError


@contextlib.contextmanager
def begin(final: Path, *, what: str, purpose: str) -> Iterator[Path]:
    """Yield a hidden folder beside ``final``, to fill and then ``fsio.publish``. Delete it if not published.

    ``what``: a word for the operation, such as ``fork``. ``purpose``: what it creates. After a kill
    the hidden folder remains, and the next attempt reports it. Raises RunFolderError if ``final``
    exists, cannot be created, lies inside a committed step, or would look like a step of a run.
    """
    building = final.with_name(f".{final.name}.{what}")
    article = "an" if what[0] in "aeiou" else "a"
    if final.exists() or final.is_symlink():
        raise RunFolderError(f"{final} exists; {article} {what} creates {purpose}. Give another name")
    for parent in final.absolute().parents:
        if (parent / paths.MANIFEST).is_file():
            raise RunFolderError(f"{final} is inside {parent}, a committed step, which must not change")
    if paths.step_number(final.name) is not None and paths.committed_steps(final.parent):
        raise RunFolderError(
            f"{final} would look like a step of the run whose checkpoints are in {final.parent}. Give "
            "another name"
        )
    try:
        fsio.make_folder(final.parent)
        _make(building, what)
    except OSError as error:
        raise RunFolderError(f"{final} cannot be created: {error}") from error
    try:
        yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _make(building: Path, what: str) -> None:
    try:
        fsio.new_folder(building)
    except FileExistsError:
        raise RunFolderError(
            f"{building} exists: another {what} is creating it, or was killed. If none is running, delete it"
        ) from None


def require_room(building: Path, size_bytes: int, num_files: int, *, what: str, hint: str = "") -> None:
    """Raise NoSpaceError if that much does not fit where ``building`` is."""
    verdict = disk_space.check(building, size_bytes, needed_files=num_files, quotas=read_quotas(building))
    if not verdict.fits:
        raise NoSpaceError(f"the {what} would not fit: {verdict}. Free some space{hint}")
