"""What a start does to a folder of checkpoints besides loading a step. None of it may end the start.

Leftovers of killed attempts are renamed and deleted; steps that are damaged, late or suspect get another
name. Each of these may fail for reasons that say nothing about the run: a file that is open elsewhere, a
folder that belongs to somebody else, a lower layer of a container's file system. Then a warning goes to the
console and the resume receipt. What could not be deleted stays. A step that could not be renamed is passed
over in memory: by this start, by retention, and by saves, until a later start can rename it.
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
"""One of ``layout``'s functions: (step, number) -> the name that a step is set aside under."""


@dataclass(frozen=True)
class PassedOver:
    """A step that should have another name and could not get it."""

    kind: str
    """``damaged``, ``late``, ``rolled back`` or ``suspect``."""
    name: NewName
    error: str


@dataclass(frozen=True)
class LateSteps:
    """What became of steps that are off the timeline."""

    moved: list[Path]
    warnings: list[str]
    """About those that could not be renamed."""


class StartCleanup:
    """Tidies one folder of checkpoints for one attempt. First rank only.

    Args:
        folder: the folder of checkpoints.
        attempt: the number of this attempt: leftovers of older ones are removed.
        owner: whose folder it is. What is another run's is left as it is.
    """

    def __init__(self, folder: Path, *, attempt: int = 0, owner: Owner = ANYONE) -> None:
        self.folder = folder
        self.attempt = attempt
        self.owner = owner
        self.warnings: list[str] = []
        """What could not be done, in words."""
        self.passed_over: dict[int, PassedOver] = {}
        """Steps under a committed step's name that nothing may load, count or keep others for."""
        self.unreadable: dict[int, str] = {}
        """Steps of which it could not be read whether they are late."""

    def remove_leftovers(self) -> None:
        """Fence and delete what older attempts have in flight; finish deletions that were cut off."""
        fenced = self.revoke_inflight()
        listing = self._listing()
        for path in listing.deleting:
            if self._is_own(path) and (path in fenced or not self._give_back(path)):
                self._try(lambda path=path: fsio.delete_tree(path), f"{path.name} could not be deleted")
        for name in (paths.LATEST, OWNER_FILE):
            replaced = self.folder / name
            self._try(lambda path=replaced: fsio.remove_leftovers(path), f"a leftover of {name} stays")

    def revoke_inflight(self) -> list[Path]:
        """Rename the checkpoints in flight of all older attempts, so that none of them can be committed.

        A process that has lost its lease renames its hidden folder to commit it; that fails from here on.
        Call it after a takeover, before steps are listed. Returns the new paths, which are to be deleted.
        """
        temporary = self._listing().temporary
        fenced = [
            self._fence(path) for path, made_by in temporary if made_by < self.attempt and self._is_own(path)
        ]
        if fenced:
            self._try(lambda: fsio.fsync_folder(self.folder), f"{self.folder} could not be synced")
        return [path for path in fenced if path is not None]

    def _is_own(self, path: Path) -> bool:
        """Whether a leftover may be renamed and deleted. Not while its manifest cannot be read."""
        try:
            return not self.owner.foreign_run(path)
        except OSError as error:
            self.warn(f"{path.name} is left as it is: its manifest cannot be read ({_why(error)})")
            return False

    def _listing(self) -> paths.FolderListing:
        try:
            return paths.list_folder(self.folder)
        except OSError as error:  # the resume lists it again, with retries, and reports it
            self.warn(f"{self.folder} could not be looked through for leftovers: {error}")
            return paths.FolderListing()

    def _fence(self, path: Path) -> Path | None:
        """Rename a folder in flight of an older attempt, so that it cannot be committed any more.

        Returns its new path, or None. Where it cannot be renamed it is deleted under its name, the manifest
        first, without which it would be a damaged step. If that fails too, what is left is the check at each
        commit and start, which sets a step aside that an older attempt has committed late.
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
                f"({_why(error)}). If that attempt commits it after all, the step is set aside then"
            )
        return None

    def _give_back(self, doomed: Path) -> bool:
        """Whether a step that is being deleted got its name back, because it is pinned and still whole.

        A deletion takes the name away before it looks for pins, and may be killed, or fail, in between.
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
        """Set aside the steps that are off the timeline. What cannot be renamed is passed over.

        ``trusted``: steps that are known to be on it; None at a start, where none is known. ``commits``: step
        and attempt of the commits in the ledger. Raises OSError when the folder cannot be listed, and, after
        a start, when a manifest cannot be read.
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
        """Rename a step. Returns its new name; empty when it is passed over instead."""
        try:
            return lineage.set_aside(self.folder, step, name).name
        except OSError as error:
            self.pass_over(step, kind, name, error)
            return ""

    def pass_over(self, step: int, kind: str, name: NewName, error: OSError) -> None:
        """From now on nothing loads the step or counts on it, though it has a committed step's name."""
        self.passed_over[step] = PassedOver(kind, name, str(error))
        self.warn(
            f"step {step} is {kind} and could not be renamed ({_why(error)}): it is passed over. To keep it "
            f"from coming up at each start, rename or delete {self.folder / paths.step_name(step)}"
        )

    def in_the_way(self, step: int) -> str:
        """Why ``step`` cannot be saved: a step of that number is passed over and cannot be renamed yet."""
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
        """Remember what could not be done."""
        self.warnings.append(text)

    def _try(self, work: Callable[[], object], what: str) -> None:
        try:
            work()
        except OSError as error:
            self.warn(f"{what}: {error}; it is tried again at the next start")


def _why(error: OSError) -> str:
    return error.strerror or str(error)
