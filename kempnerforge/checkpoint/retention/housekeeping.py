"""Background work in the checkpoint folder, on one thread of the first rank.

After a commit, the thread sets aside (renames) steps that an older attempt committed late, points
``latest`` at the new step, applies retention, records metrics measured after the commit, and makes
space for the next save. Each of these may take minutes on a slow file system. So all ranks learn of
a commit before any of this work starts, and neither a save nor a stop waits for it. After several
commits, the work is done only for the newest.

Work that a stop interrupts is finished later: a step is renamed before its bytes are deleted, and
the next start deletes what was renamed. The thread is a daemon and runs only while there is work,
so it never delays the exit of the process.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from kempnerforge.checkpoint.format import late_metrics, manifest, paths
from kempnerforge.checkpoint.format.latest_link import LatestLink
from kempnerforge.checkpoint.retention.disk_space import DiskSpaceGuard, Room
from kempnerforge.checkpoint.retention.policy import KeepPolicy
from kempnerforge.checkpoint.retention.pruner import Retention
from kempnerforge.checkpoint.retention.start_cleanup import StartCleanup
from kempnerforge.checkpoint.run import lineage
from kempnerforge.checkpoint.run.owner import Owner
from kempnerforge.checkpoint.run.save_events import MAX_EVENTS, SaveEvent, deleted
from kempnerforge.config.schema import CheckpointConfig
from kempnerforge.errors import KempnerForgeError

log = logging.getLogger(__name__)

STOP_WAIT_S = 0.5
"""How long a stop waits for work in progress. On a fast disk, this is enough to finish it."""
FINISH_WAIT_S = 60.0
"""How long the end of a finished run waits for the work."""
FULL_FOR_S = 60.0
"""How long a failed check for space is valid. Later, someone may have freed space."""
_LOOK_EVERY_S = 0.1

_LOOKED = "the checkpoint folder could not be examined"

_all: weakref.WeakSet[Housekeeping] = weakref.WeakSet()


class Saves(Protocol):
    """What the saves of a run take, on the first rank."""

    @property
    def save_bytes(self) -> int:
        """Bytes of a step."""
        ...

    @property
    def num_files(self) -> int:
        """Shard files of a step."""
        ...

    def linkable_bytes(self, step_folder: Path) -> int:
        """Return the bytes that a save after this committed step links instead of writing them."""
        ...


class Housekeeping:
    """Does the work after commits in ``folder``. First rank only; thread-safe.

    It holds no reference to the manager, so that its thread does not keep alive a manager that the
    program has dropped.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, *, run_dir: Path) -> None:
        self.room = DiskSpaceGuard(folder, config)
        self._linkable: Callable[[Path], int] = lambda _step_folder: 0
        self._retention = Retention(folder, KeepPolicy.from_config(config))
        self._cleanup = StartCleanup(folder)
        self._latest = LatestLink(folder)
        self._folder = folder
        self._run_dir = run_dir
        self._run_id = ""
        self._trusted: set[int] = set()
        """Steps that existed at the resume, or that this attempt committed."""
        self._changed = threading.Condition()
        self._disk = threading.Lock()
        """Held while something is deleted or set aside."""
        self._newest: int | None = None
        """The newest step for whose commit the work has not started yet."""
        self._doing: int | None = None
        self._measured: dict[int, dict[str, float]] = {}
        self._is_running = self._is_over = False
        self._more_saves = True
        self._full: tuple[Room, float] | None = None
        """Result and time of the last check for space; None if a save fitted."""
        self._look = False
        self._events: deque[SaveEvent] = deque(maxlen=MAX_EVENTS)
        self._warnings: deque[str] = deque(maxlen=MAX_EVENTS)
        _all.add(self)

    def move(self, folder: Path, owner: Owner) -> None:
        """Use ``folder``, which belongs to ``owner``. Call before the first commit."""
        self._folder = self._retention.folder = folder
        self._run_id = owner.run_id
        self._retention.owner = owner
        self._cleanup = StartCleanup(folder, owner=owner)
        self._latest = LatestLink(folder)
        self.room.move(folder, owner)

    def before_training(self, saves: Saves, newest: int | None) -> str:
        """Check whether one save fits after step ``newest``. Return a warning, or an empty string."""
        self._linkable = saves.linkable_bytes
        try:
            self._expect_links(newest)
            return self.room.before_training(saves.save_bytes, saves.num_files)
        except OSError as error:
            return f"cannot check whether a save fits on the disk: {error}"

    def _expect_links(self, newest: int | None) -> None:
        if newest is not None:
            self.room.expect_links(self._linkable(self._folder / paths.step_name(newest)))

    def started(self, cleanup: StartCleanup, steps: list[int]) -> None:
        """Begin after a resume. ``steps`` are on the run's timeline, so they are never set aside as late.

        ``cleanup.passed_over`` are the steps that the start had to skip.
        """
        self._cleanup = cleanup
        self._trusted.update(set(steps) - cleanup.passed_over.keys())
        self._retention.passed_over = self.room.passed_over = cleanup.passed_over

    def committed(self, step: int, *, more_saves: bool = True) -> None:
        """Start the work that follows the commit of ``step``. Never blocks.

        ``more_saves``: whether to make space for another save.
        """
        with self._changed:
            self._trusted.add(step)
            self._newest, self._more_saves = step, more_saves
            self._begin()

    def measured(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of a step whose save has started, once it is committed. Never blocks."""
        with self._changed:
            self._measured = {number: values for number, values in self._measured.items() if number >= step}
            self._measured.setdefault(step, {}).update(metrics)
            if step in self._trusted:
                self._begin()

    def no_room(self, step: int) -> str:
        """Return why a save of ``step`` does not fit, if known; otherwise an empty string. Never blocks.

        The space is then checked again in the background, for the save after this one.
        """
        with self._changed:
            if self._full is None or time.monotonic() - self._full[1] > FULL_FOR_S:
                return ""
            self._look = True
            self._begin()
            return self._full[0].warning(step)

    def before_write(self, step: int, *, must_save: bool) -> str:
        """Return why a save of ``step`` does not fit; empty if it does, or with ``must_save``.

        Runs on the background thread of the save. Blocks only if there is no space, until retention
        has deleted what it may.
        """
        try:
            if step not in self._trusted and (self._folder / paths.step_name(step)).exists():
                with self._disk:
                    self._set_aside_late()
                    if why := self._cleanup.in_the_way(step):
                        return why
            if self.room.fits():
                return ""
            with self._disk:
                room = self._make_room()
        except (OSError, KempnerForgeError):
            return ""  # the save fails with the same error and reports it
        return "" if room.fits or must_save else room.warning(step)

    def events(self) -> list[SaveEvent]:
        """Return the deletions since the last call, as ledger events."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def warnings(self) -> list[str]:
        """Return the failures since the last call."""
        return [self._warnings.popleft() for _ in range(len(self._warnings))]

    def wait(self, timeout_s: float, *, give_up: Callable[[], bool] = lambda: False) -> bool:
        """Wait for all work, at most ``timeout_s`` or until ``give_up``. Return whether all is done."""
        until = time.monotonic() + timeout_s
        with self._changed:
            while self._is_running and not give_up() and (left_s := until - time.monotonic()) > 0:
                self._changed.wait(min(left_s, _LOOK_EVERY_S))
            return not self._is_running

    def finish(self, *, give_up: Callable[[], bool]) -> None:
        """Wait at the end of a finished run until all steps that no rule keeps are deleted."""
        if not self.wait(FINISH_WAIT_S, give_up=give_up) and not give_up():
            self._warn(
                f"older checkpoints are still being deleted {FINISH_WAIT_S:.0f} s after the last commit; the "
                "next start continues"
            )

    def close(self) -> None:
        """Start no more work, and wait at most ``STOP_WAIT_S`` for work in progress."""
        with self._changed:
            first, self._is_over = not self._is_over, True
        if not self.wait(STOP_WAIT_S) and first:
            step = self._doing if self._doing is not None else self._newest
            self._warn(
                f"the work after the commit of step {step} (deleting older checkpoints, {paths.LATEST}) was "
                "interrupted; the next start finishes it"
            )

    def _begin(self) -> None:
        if self._is_running or self._is_over:
            return
        self._is_running = True
        try:
            threading.Thread(target=self._work, name="checkpoint-housekeeping", daemon=True).start()
        except RuntimeError as error:
            self._is_running = False
            self._warn(f"older checkpoints could not be deleted: cannot start a thread: {error}")

    def _work(self) -> None:
        while True:
            with self._changed:
                measured = {s: m for s, m in self._measured.items() if s in self._trusted}
                look, self._look = self._look, False
                if self._is_over or (self._newest is None and not measured and not look):
                    self._is_running = False
                    self._changed.notify_all()
                    return
                step, self._newest = self._newest, None
                self._doing = step
                self._measured = {s: m for s, m in self._measured.items() if s not in measured}
            for number, metrics in measured.items():
                self._try(
                    lambda number=number, metrics=metrics: self._record(number, metrics),
                    f"the metrics of step {number} could not be recorded beside it",
                )
            if step is not None:
                self._follow_up(step)
            elif look:
                self._try(self._make_room, _LOOKED)

    def _follow_up(self, step: int) -> None:
        self._try(self._set_aside_late, _LOOKED)
        self._try(lambda: self._link(step), f"{paths.LATEST} could not be pointed at step {step}")
        self._try(lambda: self._prune(step), "older checkpoints could not be deleted")
        self._try(lambda: self._expect_links(step), _LOOKED)
        if self._more_saves:
            self._try(self._make_room, _LOOKED)

    def _try(self, work: Callable[[], object], problem: str) -> None:
        """Do one piece of work, unless closed. A failure is a warning: the commit is valid."""
        if self._is_over:
            return
        try:
            with self._disk:
                work()
        except Exception as error:  # noqa: BLE001 - no failure here may end the run
            self._warn(f"{problem}: {error}")

    def _set_aside_late(self) -> None:
        known = {*self._trusted, *self._cleanup.passed_over}
        cuts = lineage.cuts(self._run_dir)
        late = self._cleanup.set_aside_late(cuts, run_id=self._run_id, trusted=known)
        for path in late.moved:
            self._warn(f"a step that an older attempt committed late was set aside as {path.name}")
        for text in late.warnings:
            self._warn(text)

    def _link(self, step: int) -> None:
        for text in self._latest.point_at(step):
            self._warn(text)

    def _prune(self, step: int) -> None:
        pruned = self._retention.apply(stop=lambda: self._is_over)
        self._note_deleted(pruned.deleted, step)
        for text in pruned.warnings:
            self._warn(text)

    def _make_room(self) -> Room:
        self.room.refresh()
        room = self.room.make(stop=lambda: self._is_over)
        self._full = None if room.fits else (room, time.monotonic())
        self._note_deleted(room.pruned, None)
        return room

    def _record(self, step: int, metrics: Mapping[str, float]) -> None:
        origin = manifest.read(self._folder / paths.step_name(step)).provenance
        late_metrics.append(self._folder, origin, metrics)

    def _note_deleted(self, steps: list[int] | tuple[int, ...], after_commit: int | None) -> None:
        if steps:
            rules = [rule.describe() for rule in self._retention.policy.rules]
            self._events.append(deleted(steps, rules, after_commit=after_commit))

    def _warn(self, text: str) -> None:
        self._warnings.append(text)


@atexit.register
def _end_all() -> None:
    """Close what programs did not close, and log the remaining warnings."""
    for housekeeping in list(_all):
        housekeeping.close()
        for text in housekeeping.warnings():
            log.warning(text)
