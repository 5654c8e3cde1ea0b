"""Clean up a checkpoint folder at a start. A failure to clean up never ends the start.

Leftovers of killed attempts are renamed and deleted. Steps that are damaged, late or suspect are
renamed. Each of these can fail for reasons unrelated to the run: a file that is open elsewhere, a
folder of another user, a lower layer of a container's file system. Such a failure is a warning on
the console and in the resume receipt. A leftover that cannot be deleted is left. A step that cannot
be renamed is skipped by this start, by retention, and by saves, until a later start can rename it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kempnerforge import fsio
from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.retention import pins
from kempnerforge.checkpoint.run import lineage
from kempnerforge.checkpoint.run.lineage import ResumePoint
from kempnerforge.checkpoint.run.owner import ANYONE, OWNER_FILE, Owner
from kempnerforge.errors import CheckpointError

NewName = Callable[[int, int], str]
"""A function of ``paths``: (step, number) -> the new name of a step that is set aside."""


@dataclass(frozen=True)
class PassedOver:
    """A step that should be renamed, but could not be."""

    kind: str
    """``damaged``, ``late``, ``rolled back`` or ``suspect``."""
    name: NewName
    error: str


@dataclass(frozen=True)
class LateSteps:
    """What happened to the steps that are not on the run's timeline (see ``lineage``)."""

    moved: list[Path]
    warnings: list[str]
    """One for each step that could not be renamed."""


class StartCleanup:
    """Cleans up one checkpoint folder for one attempt. First rank only.

    Args:
        folder: the checkpoint folder.
        attempt: the number of this attempt. Leftovers of older ones are removed.
        owner: the owner of the folder. Steps of other runs are left as they are.
    """

    def __init__(self, folder: Path, *, attempt: int = 0, owner: Owner = ANYONE) -> None:
        self.folder = folder
        self.attempt = attempt
        self.owner = owner
        self.warnings: list[str] = []
        """What could not be done."""
        self.passed_over: dict[int, PassedOver] = {}
        """Steps with the name of a committed step that must not be loaded or counted."""
        self.unreadable: dict[int, str] = {}
        """Steps whose manifest could not be read. They may be late."""

    def remove_leftovers(self) -> None:
        """Delete the checkpoints that older attempts did not finish, and complete interrupted deletions."""
        fenced = self.revoke_inflight()
        listing = self._listing()
        for path in listing.deleting:
            if self._is_own(path) and (path in fenced or not self._give_back(path)):
                self._try(lambda path=path: fsio.delete_tree(path), f"{path.name} could not be deleted")
        for name in (paths.LATEST, OWNER_FILE):
            replaced = self.folder / name
            self._try(
                lambda path=replaced: fsio.remove_leftovers(path),
                f"a leftover of {name} could not be removed",
            )

    def revoke_inflight(self) -> list[Path]:
        """Rename all older attempts' checkpoints in flight, so that none of them can be committed.

        A checkpoint in flight is a hidden folder that is still being written. To commit it, a
        process renames the folder. After this call that fails for a process that has lost its
        lease. Call this after a takeover, before listing steps. Returns the new paths, to delete.
        """
        temporary = self._listing().temporary
        fenced = [
            self._fence(path) for path, made_by in temporary if made_by < self.attempt and self._is_own(path)
        ]
        if fenced:
            self._try(lambda: fsio.fsync_folder(self.folder), f"{self.folder} could not be synced")
        return [path for path in fenced if path is not None]

    def _is_own(self, path: Path) -> bool:
        """Return whether a leftover may be renamed and deleted. False if its manifest cannot be read."""
        try:
            return not self.owner.foreign_run(path)
        except OSError as error:
            self.warn(f"{path.name} is left as it is: its manifest cannot be read ({_why(error)})")
            return False

    def _listing(self) -> paths.FolderListing:
        try:
            return paths.list_folder(self.folder)
        except OSError as error:  # the resume lists the folder again, with retries, and reports the error
            self.warn(f"{self.folder} could not be searched for leftovers: {error}")
            return paths.FolderListing()

    def _fence(self, path: Path) -> Path | None:
        """Rename an older attempt's checkpoint in flight, so that it can no longer be committed.

        Returns its new path, or None. If it cannot be renamed, it is deleted, manifest first: a
        late commit then yields only a damaged step. If the deletion fails too, the checks at each
        commit and start still set aside a step that an older attempt has committed late.
        """
        target = path.with_name(paths.fenced_name(path.name, self.attempt))
        try:
            if os.path.lexists(target):
                target = fsio.free_deleting_path(path)
            os.rename(path, target)
            return target
        except FileNotFoundError:
            return None  # its attempt has committed or deleted it
        except OSError as error:
            renaming = error
        try:
            (path / paths.MANIFEST).unlink(missing_ok=True)
            fsio.delete_tree(path)
            self.warn(
                f"{path.name} of an older attempt could not be renamed ({_why(renaming)}); it was deleted"
            )
        except OSError as error:
            self.warn(
                f"{path.name} of an older attempt could not be renamed ({_why(renaming)}) or deleted "
                f"({_why(error)}). If that attempt still commits it, the step is set aside then"
            )
        return None

    def _give_back(self, doomed: Path) -> bool:
        """Restore the name of a step that is being deleted if it is pinned and intact. Return whether it was.

        A deletion renames the step before it checks for pins, and may be killed or fail in between.
        """
        step = paths.step_number(doomed.name.removeprefix(".").split(".")[0])
        if step is None or ".tmp" in doomed.name:
            return False
        with contextlib.suppress(CheckpointError, OSError):
            found = manifest.load(doomed, step=step)
            pin = pins.read(self.folder).get(step)
            origin = (found.provenance.run_id, found.provenance.attempt)
            final = self.folder / paths.step_name(step)
            if pin is not None and pin.is_of(origin) and not os.path.lexists(final):
                os.rename(doomed, final)
                fsio.fsync_folder(self.folder)
                return True
        return False

    def set_aside_late(
        self,
        cuts: Sequence[ResumePoint],
        *,
        run_id: str,
        trusted: Collection[int] | None = None,
        commits: Callable[[], Iterable[tuple[int, int]]] = tuple,
    ) -> LateSteps:
        """Set aside the steps that are not on the timeline. Those that cannot be renamed are skipped.

        ``trusted``: steps known to be on the timeline; None at a start, when none are known.
        ``commits``: returns step and attempt of the commits in the ledger. Raises OSError if the
        folder cannot be listed, and, except at a start, if a manifest cannot be read.
        """
        at_start, before = trusted is None, len(self.warnings)
        self.unreadable.clear()

        def failed(step: int, name: NewName, error: OSError) -> None:
            kind = "rolled back" if name is paths.rolled_back_name else "late"
            self.pass_over(step, kind, name, error)

        moved = lineage.set_aside_late(
            self.folder,
            cuts,
            run_id=run_id,
            parent=(self.owner.parent_run_id, self.owner.parent_step),
            trusted=trusted or (),
            commits=commits,
            at_start=at_start,
            failed=failed,
            unread=(lambda step, error: self.unreadable.__setitem__(step, str(error))) if at_start else None,
        )
        return LateSteps(moved, self.warnings[before:])

    def set_aside(self, step: int, kind: str, name: NewName) -> str:
        """Rename a step. Return its new name, or an empty string if it could not be renamed."""
        try:
            return lineage.set_aside(self.folder, step, name).name
        except OSError as error:
            self.pass_over(step, kind, name, error)
            return ""

    def pass_over(self, step: int, kind: str, name: NewName, error: OSError) -> None:
        """Skip a step from now on, although it has the name of a committed step."""
        self.passed_over[step] = PassedOver(kind, name, str(error))
        self.warn(
            f"step {step} is {kind} and could not be renamed ({_why(error)}), so it is skipped. To avoid "
            f"this warning at each start, rename or delete {self.folder / paths.step_name(step)}"
        )

    def in_the_way(self, step: int) -> str:
        """Return why ``step`` cannot be saved: a skipped step has its name and still cannot be renamed."""
        known = self.passed_over.get(step)
        if known is None:
            return ""
        path = self.folder / paths.step_name(step)
        try:
            if os.path.lexists(path):
                lineage.set_aside(self.folder, step, known.name)
        except OSError as error:
            return (
                f"step {step} cannot be saved: {path} is in the way, which is {known.kind} and cannot be "
                f"renamed ({_why(error)}). Rename or delete it"
            )
        del self.passed_over[step]
        return ""

    def warn(self, text: str) -> None:
        """Add a warning."""
        self.warnings.append(text)

    def _try(self, work: Callable[[], object], what: str) -> None:
        try:
            work()
        except OSError as error:
            self.warn(f"{what}: {error}; the next start tries again")


def _why(error: OSError) -> str:
    return error.strerror or str(error)
