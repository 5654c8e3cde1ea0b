"""Applying what ``keep`` decides: steps that nothing keeps lose their name first, then their bytes."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Pruned:
    """What an application of the policy did."""

    deleted: tuple[int, ...] = ()
    """Steps that are gone, oldest first."""
    warnings: tuple[str, ...] = ()
    """What could not be deleted, and why."""


class Retention:
    """Applies a policy to a checkpoint folder, again and again.

    All that it remembers is which steps it has found sound: a committed step does not change. The newest
    sound one is looked at every time all the same.
    """

    def __init__(self, folder: Path, policy: KeepPolicy, owner: Owner = ANYONE) -> None:
        self.folder = folder
        self.policy = policy
        self.owner = owner
        """Whose folder it is. Steps of other runs count for nothing and are never deleted."""
        self.passed_over: Collection[int] = ()
        """Steps that this attempt neither loads nor counts: another one is the newest sound step."""
        self._sound: dict[int, tuple[tuple[int, ...], StepInfo]] = {}
        self._unfinished: list[Path] = []
        self._to_give_back: dict[Path, Path] = {}

    def survey(
        self, steps: Sequence[int] | None = None, *, seen: Callable[[int, Manifest], object] = lambda *_: None
    ) -> list[StepInfo]:
        """What is on disk now. Steps that vanish meanwhile are left out. Raises OSError.

        ``steps``, newest first, are those of a listing that was just made. ``seen`` is told the manifest of
        every step that is looked at anew and found sound.
        """
        pinned, read = pins.read(self.folder), read_locks.readers(self.folder)
        late = late_metrics.read(self.folder)
        found: list[StepInfo] = []
        any_sound = False
        for step in paths.list_folder(self.folder).steps if steps is None else steps:
            if step in self.passed_over:
                found.append(StepInfo(step, problem="passed over by the run, which could not rename it"))
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
        """What ``apply`` would do now, newest step first. Changes nothing. Raises OSError."""
        return decide(self.survey(), self.policy)

    def apply(self, *, stop: Callable[[], bool] = lambda: False) -> Pruned:
        """Delete what nothing keeps, oldest first; begin with no further step once ``stop`` returns True.

        Safe beside other processes that save, read, pin or prune in the folder. What cannot be deleted is a
        warning: the next call tries again. Raises OSError when the folder cannot be listed.
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
        sound = [one.step for one in facts if not one.problem and not one.foreign]
        for verdict in reversed(decide(facts, self.policy)):
            if stop():
                break
            if verdict.keep or not self._is_committed(max(sound)):
                continue
            if (doomed := self._invalidate(verdict.step, warnings)) is not None:
                self._delete_tree(doomed, warnings)
                deleted.append(verdict.step)
        return Pruned(tuple(deleted), tuple(warnings))

    def _is_committed(self, step: int) -> bool:
        """Whether the step that the decision rests on is still there: a rollback may set it aside."""
        return (self.folder / paths.step_name(step) / paths.MANIFEST).is_file()

    def _look(self, step: int, seen: Callable[[int, Manifest], object], *, anew: bool) -> StepInfo:
        """What the manifest of a sound step says. Raises DamagedCheckpointError, MismatchError, OSError."""
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
        """Take the step's name away, durably; None when it stays after all, or somebody else was first.

        Returns the name that it is deleted under.
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
            # It was done all the same, as network file systems have it.
        if self._is_claimed(step):
            self._give_back(doomed, path, warnings)
            return None
        self._sound.pop(step, None)
        try:
            fsio.fsync_folder(self.folder)
        except OSError as error:
            warnings.append(f"{doomed} could not be deleted: {error}; it is tried again after the next save")
            self._unfinished.append(doomed)
            return None
        return doomed

    def _give_back(self, doomed: Path, path: Path, warnings: list[str]) -> None:
        """Give a step its name again. Where that fails the next call does it, or the next start."""
        try:
            os.rename(doomed, path)
        except OSError as error:
            warnings.append(f"{doomed} is pinned or read, and could not be renamed to {path.name}: {error}")
            self._to_give_back[doomed] = path

    def _is_claimed(self, step: int) -> bool:
        """Whether somebody pinned or held the step while it still had its name, and so relies on it."""
        try:
            pin, known = pins.read(self.folder).get(step), self._sound.get(step)
            is_pinned = pin is not None and pin.is_of(known[1].origin if known is not None else None)
            return is_pinned or step in read_locks.readers(self.folder)
        except OSError:  # not known: it stays for now
            return True

    def _delete_tree(self, doomed: Path, warnings: list[str]) -> None:
        try:
            fsio.delete_tree(doomed)
        except OSError as error:
            warnings.append(f"{doomed} could not be deleted: {error}; it is tried again after the next save")
            self._unfinished.append(doomed)


def _identity(step_folder: Path) -> tuple[int, ...]:
    stat = os.stat(f"{step_folder}/{paths.MANIFEST}")
    return stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size
