"""Delete the steps that ``policy`` does not keep. Each is renamed first, and then its files are deleted."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kempnerforge import fsio
from kempnerforge.checkpoint.format import late_metrics, paths
from kempnerforge.checkpoint.format.manifest import Manifest
from kempnerforge.checkpoint.retention import pins, read_locks
from kempnerforge.checkpoint.retention.policy import KeepPolicy, StepInfo, Verdict, decide
from kempnerforge.checkpoint.run.owner import ANYONE, Owner
from kempnerforge.checkpoint.run.resumable_steps import load_resumable
from kempnerforge.errors import CheckpointError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruned:
    """The result of applying the policy."""

    deleted: tuple[int, ...] = ()
    """Deleted steps, oldest first."""
    warnings: tuple[str, ...] = ()
    """What could not be deleted, and why."""


class Retention:
    """Applies a policy to a checkpoint folder, repeatedly.

    It caches only which steps are sound, because a committed step does not change. The newest sound
    step is checked again each time.
    """

    def __init__(self, folder: Path, policy: KeepPolicy, owner: Owner = ANYONE) -> None:
        self.folder = folder
        self.policy = policy
        self.owner = owner
        """The owner of the folder. Steps of other runs are not counted and never deleted."""
        self.passed_over: Collection[int] = ()
        """Steps that this attempt skips: it neither loads them nor counts them as sound."""
        self._sound: dict[int, tuple[tuple[int, ...], StepInfo]] = {}
        self._unfinished: list[Path] = []
        self._to_give_back: dict[Path, Path] = {}

    def survey(
        self, steps: Sequence[int] | None = None, *, seen: Callable[[int, Manifest], object] = lambda *_: None
    ) -> list[StepInfo]:
        """Return what a decision depends on, for each step on disk. Raises OSError.

        Steps that disappear meanwhile are left out.

        ``steps``: newest first, from a listing made just now. ``seen`` is called with every step
        that is checked and found sound, and its manifest.
        """
        pinned, read = pins.read(self.folder), read_locks.readers(self.folder)
        late = late_metrics.read(self.folder)
        found: list[StepInfo] = []
        any_sound = False
        for step in paths.list_folder(self.folder).steps if steps is None else steps:
            if step in self.passed_over:
                found.append(StepInfo(step, problem="skipped by the run, which could not rename it"))
                continue
            try:
                facts = self._look(step, seen, anew=not any_sound)
                any_sound |= not facts.foreign
            except (CheckpointError, OSError) as error:
                facts = StepInfo(step, problem=str(error))
            if facts.problem and not (self.folder / paths.step_name(step)).exists():
                continue
            if facts.origin is not None and (more := late.get((step, *facts.origin))):
                facts = replace(facts, metrics={**facts.metrics, **more})
            is_pinned = step in pinned and pinned[step].is_of(facts.origin)
            if is_pinned or step in read:
                pin = pinned[step].describe() if is_pinned else ""
                facts = replace(facts, pin=pin, readers=tuple(read.get(step, ())))
            found.append(facts)
        return found

    def verdicts(self) -> list[Verdict]:
        """Return what ``apply`` would do, newest step first. Changes nothing. Raises OSError."""
        return decide(self.survey(), self.policy)

    def apply(self, *, stop: Callable[[], bool] = lambda: False) -> Pruned:
        """Delete the steps that no rule keeps, oldest first, until ``stop`` returns True.

        Other processes may save, read, pin or prune in the folder at the same time. A failed
        deletion is a warning, and the next call tries again. Raises OSError if the folder cannot be
        listed.
        """
        read_locks.remove_stale(self.folder)
        unfinished, self._unfinished = self._unfinished, []
        to_give_back, self._to_give_back = self._to_give_back, {}
        deleted: list[int] = []
        warnings: list[str] = []
        if unfinished:
            fsio.fsync_folder(self.folder)
        for path in unfinished:
            self._delete_tree(path, warnings)
        for doomed, path in to_give_back.items():
            self._give_back(doomed, path, warnings)
        facts = self.survey()
        sound = [info.step for info in facts if not info.problem and not info.foreign]
        for verdict in reversed(decide(facts, self.policy)):
            if stop():
                break
            if verdict.keep or not self._is_committed(max(sound)):
                continue
            log.debug("no rule keeps step %d, of steps %s", verdict.step, sorted(sound))
            if (doomed := self._invalidate(verdict.step, warnings)) is not None:
                self._delete_tree(doomed, warnings)
                deleted.append(verdict.step)
        return Pruned(tuple(deleted), tuple(warnings))

    def _is_committed(self, step: int) -> bool:
        """Return whether the step that the decision depends on still exists. A rollback may set it aside."""
        return (self.folder / paths.step_name(step) / paths.MANIFEST).is_file()

    def _look(self, step: int, seen: Callable[[int, Manifest], object], *, anew: bool) -> StepInfo:
        """Return what the manifest of a sound step says.

        Raises DamagedCheckpointError, MismatchError, OSError.
        """
        path = self.folder / paths.step_name(step)
        known = self._sound.get(step)
        if known is not None and not anew and known[0] == _identity(path):
            return known[1]
        found = load_resumable(path, step=step, owner=self.owner)
        seen(step, found)
        known_origin = (found.provenance.run_id, found.provenance.attempt)
        foreign = "" if self.owner.owns(found.provenance) else found.provenance.run_id
        facts = StepInfo(step, found.provenance.metrics, foreign=foreign, origin=known_origin)
        self._sound[step] = (_identity(path), facts)
        return facts

    def _invalidate(self, step: int, warnings: list[str]) -> Path | None:
        """Rename the step durably so that it is no longer committed. Return its new path.

        Returns None if it is kept after all, or if another process was faster.
        """
        path = self.folder / paths.step_name(step)
        try:
            doomed = fsio.free_deleting_path(path)
        except OSError as error:
            warnings.append(f"step {step} could not be deleted: {error}")
            return None
        try:
            os.rename(path, doomed)
        except FileNotFoundError:
            return None
        except OSError as error:
            if os.path.lexists(path) or not os.path.lexists(doomed):
                warnings.append(f"step {step} could not be deleted: {error}")
                return None
            # The rename succeeded in spite of the error, as can happen on network file systems.
        if self._is_claimed(step):
            self._give_back(doomed, path, warnings)
            return None
        self._sound.pop(step, None)
        try:
            fsio.fsync_folder(self.folder)
        except OSError as error:
            warnings.append(f"{doomed} could not be deleted: {error}; this is retried after the next save")
            self._unfinished.append(doomed)
            return None
        return doomed

    def _give_back(self, doomed: Path, path: Path, warnings: list[str]) -> None:
        """Restore the name of a step. If that fails, the next call or the next start tries again."""
        try:
            os.rename(doomed, path)
        except OSError as error:
            warnings.append(f"{doomed} is pinned or read, and could not be renamed to {path.name}: {error}")
            self._to_give_back[doomed] = path

    def _is_claimed(self, step: int) -> bool:
        """Return whether someone pinned or locked the step while it still had its name."""
        try:
            pin, known = pins.read(self.folder).get(step), self._sound.get(step)
            is_pinned = pin is not None and pin.is_of(known[1].origin if known is not None else None)
            return is_pinned or step in read_locks.readers(self.folder)
        except OSError:  # unknown, so keep it for now
            return True

    def _delete_tree(self, doomed: Path, warnings: list[str]) -> None:
        try:
            fsio.delete_tree(doomed)
        except OSError as error:
            warnings.append(f"{doomed} could not be deleted: {error}; this is retried after the next save")
            self._unfinished.append(doomed)


def _identity(step_folder: Path) -> tuple[int, ...]:
    stat = os.stat(f"{step_folder}/{paths.MANIFEST}")
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size
