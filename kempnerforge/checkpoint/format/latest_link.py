"""The symbolic link ``latest``, a convenience for users.

Nothing depends on it, and nothing fails without it.
"""

from __future__ import annotations

import os
from pathlib import Path

from kempnerforge import fsio
from kempnerforge.checkpoint.format import paths


class LatestLink:
    """``latest`` in one checkpoint folder. A problem with it is reported once."""

    def __init__(self, folder: Path) -> None:
        self._link = folder / paths.LATEST
        self._has_warned = False

    def point_at(self, step: int) -> list[str]:
        """Point the link at ``step``. Return a warning on the first failure. Never raises OSError."""
        warning = point(self._link.parent, step)
        if not warning or self._has_warned:
            return []
        self._has_warned = True
        return [warning]


def resolve(path: Path) -> Path:
    """Resolve ``path``: if its name is ``latest``, return the newest committed step in its folder.

    The link may be missing, point at an older step after a crash, or be a copy of a step. Any other
    path is returned unchanged, and so is ``latest`` in a folder without steps. Raises OSError.
    """
    steps = paths.committed_steps(path.parent) if path.name == paths.LATEST else []
    return path.with_name(paths.step_name(steps[0])) if steps else path


def point(folder: Path, step: int) -> str:
    """Point ``latest`` in ``folder`` at ``step``. Return a warning, or an empty string. Never raises OSError.

    Anything of that name that is not a link, such as a folder made by ``cp -rL``, is left
    unchanged.
    """
    link = folder / paths.LATEST
    try:
        if os.path.lexists(link) and not link.is_symlink():
            return (
                f"{link} is not a symbolic link, so it is left as it is and does not follow the newest step. "
                "Nothing depends on it; to restore the link, rename or delete it"
            )
        fsio.point_symlink(link, paths.step_name(step))
    except OSError as error:
        why = error.strerror or str(error)
        return f"{link} could not be pointed at step {step} ({why}). Nothing depends on this link"
    return ""


def remove(folder: Path) -> str:
    """Remove ``latest`` if it is a link. Return a warning, or an empty string. Never raises OSError."""
    link = folder / paths.LATEST
    try:
        if link.is_symlink():
            link.unlink(missing_ok=True)
    except OSError as error:
        return f"{link} could not be removed ({error.strerror or error}). Nothing depends on this link"
    return ""
