"""Check whether a save fits on the disk, and decide what to do if it does not.

The size of a save is known before it starts, so a full disk is detected before the first byte is
written:

1. A save that fits is written.
2. Otherwise, delete what retention allows, and check again.
3. Otherwise, skip this save with a warning, and continue training.

Another process may fill the disk after the check. Then the save fails, leaves nothing behind, and
is counted as failed.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.retention.policy import KeepPolicy
from kempnerforge.checkpoint.retention.pruner import Retention
from kempnerforge.checkpoint.retention.quota import Quotas, read_quotas
from kempnerforge.checkpoint.run.owner import Owner
from kempnerforge.config.schema import CheckpointConfig
from kempnerforge.errors import CheckpointError, NoSpaceError

RESERVE_BYTES = 64 << 20
"""Reserved for what a run writes besides checkpoints: metrics, logs, uploads. At most 2% of the disk."""
RESERVE_FILES = 64
_SMALL_FILES = 4
"""Besides the shards: index, train state, config, manifest."""
_SMALL_BYTES = 1 << 18


@dataclass(frozen=True)
class SpaceCheck:
    """Result of checking whether one save fits."""

    folder: Path
    needed_bytes: int
    needed_files: int
    free_bytes: int | None
    """The least that any known limit leaves, without subtracting the reserve; None if no limit is known."""
    free_files: int | None
    limited_by: str
    """The limit on ``free_bytes``, or on ``free_files`` if only files are lacking."""
    fits: bool
    unread: str = ""
    """Why some quotas are unknown; empty if all were read."""

    def __str__(self) -> str:
        what = f"{_size(self.needed_bytes)} in {self.needed_files} files"
        have = "space" if self.free_bytes is None else _size(self.free_bytes)
        files = "" if self.free_files is None else f" and {self.free_files} files"
        return f"a save needs {what}; {self.folder} has {have}{files} left ({self.limited_by})"


class Action(Enum):
    """What to do about a save that is due."""

    save = "save"
    prune = "prune"
    """Delete what retention allows, then check again."""
    skip = "skip"
    """Skip this save. The next one that is due is checked again."""


@dataclass(frozen=True)
class Room:
    """Result of ``make_room``."""

    verdict: SpaceCheck
    pruned: list[int] = field(default_factory=list)
    """Steps that were deleted."""

    @property
    def fits(self) -> bool:
        """Whether the save fits."""
        return self.verdict.fits

    def warning(self, step: int) -> str:
        """Return the warning for a save that is skipped."""
        return (
            f"NO CHECKPOINT of step {step}: {self.verdict}, and retention allows no more deletions. "
            "Training continues. Free some space, or keep fewer checkpoints"
        )


def check(
    folder: Path,
    needed_bytes: int,
    *,
    needed_files: int = 0,
    reserve_bytes: int = RESERVE_BYTES,
    quotas: Quotas | None = None,
) -> SpaceCheck:
    """Check whether ``needed_bytes`` fit in ``folder``, which may not exist yet. ``quotas``: as last read.

    Makes one system call. The caller reads the quotas, which may take seconds. Raises OSError.
    """
    quotas = quotas or Quotas()
    stat = os.statvfs(_existing(folder))
    if stat.f_blocks:
        reserve_bytes = min(reserve_bytes, stat.f_blocks * stat.f_frsize // 50)
    bytes_left, files_left = {}, {}
    # Some file systems report zeros for what they do not limit.
    if stat.f_blocks:
        bytes_left["file system"] = stat.f_bavail * stat.f_frsize
    if stat.f_files:
        files_left["file system"] = stat.f_favail
    for quota in quotas.known:
        if quota.free_bytes is not None:
            bytes_left[quota.whose] = min(quota.free_bytes, bytes_left.get(quota.whose, quota.free_bytes))
        if quota.free_files is not None:
            files_left[quota.whose] = min(quota.free_files, files_left.get(quota.whose, quota.free_files))
    by_bytes = min(bytes_left, key=bytes_left.__getitem__, default="no limit known")
    by_files = min(files_left, key=files_left.__getitem__, default="no limit known")
    free_bytes, free_files = bytes_left.get(by_bytes), files_left.get(by_files)
    bytes_fit = free_bytes is None or needed_bytes + reserve_bytes <= free_bytes
    files_fit = free_files is None or needed_files + RESERVE_FILES <= free_files
    return SpaceCheck(
        folder=folder,
        needed_bytes=needed_bytes,
        needed_files=needed_files,
        free_bytes=free_bytes,
        free_files=free_files,
        limited_by=by_files if bytes_fit and not files_fit else by_bytes,
        fits=bytes_fit and files_fit,
        unread=quotas.unread,
    )


def next_action(verdict: SpaceCheck, *, has_pruned: bool) -> Action:
    """Return what to do about a save that is due: save it if it fits, else prune once, else skip it."""
    if verdict.fits:
        return Action.save
    return Action.skip if has_pruned else Action.prune


def make_room(look: Callable[[], SpaceCheck], prune: Callable[[], Sequence[int]]) -> Room:
    """Check the disk, delete what retention allows if needed, and check again.

    ``prune`` deletes steps, but not the newest sound one, and returns the deleted ones. Raises what
    ``look`` and ``prune`` raise.
    """
    verdict = look()
    if next_action(verdict, has_pruned=False) is not Action.prune:
        return Room(verdict)
    pruned = list(prune())
    return Room(look() if pruned else verdict, pruned)


def require_one_save(verdict: SpaceCheck, *, prunable_bytes: int) -> str:
    """Raise NoSpaceError before training if no save would fit in addition to the newest checkpoint.

    ``prunable_bytes``: the size of the checkpoints that retention would delete. Returns a warning
    if a save fits only after their deletion, or if limits are unknown; otherwise an empty string.
    """
    if not verdict.fits:
        free_bytes = verdict.free_bytes
        too_large = free_bytes is not None and verdict.needed_bytes > free_bytes + prunable_bytes
        if not prunable_bytes or too_large:
            raise NoSpaceError(
                f"not one checkpoint would fit: {verdict}. Free some space, set checkpoint.dir to a larger "
                "file system, or train without checkpoints (--checkpoint.interval=0 "
                "--checkpoint.save_last=false)"
            )
        return f"{verdict}: older checkpoints will be deleted before the next save"
    return f"quota unknown, so only the file system is checked ({verdict.unread})" if verdict.unread else ""


class DiskSpaceGuard:
    """Makes space for a save: deletes before it what retention would delete after it. First rank only."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self._folder = folder
        # The save that needs the space will itself be one of the last N.
        before = config.model_copy(update={"keep_last_n": max(1, config.keep_last_n - 1)})
        self._retention = Retention(folder, KeepPolicy.from_config(before))
        self._quotas = Quotas()
        self._needed_bytes = 0
        self._needed_files = 0
        self._linked_bytes = 0
        """How many of the needed bytes the next save links instead of writing them."""

    @property
    def passed_over(self) -> Collection[int]:
        """See ``Retention.passed_over``."""
        return self._retention.passed_over

    @passed_over.setter
    def passed_over(self, steps: Collection[int]) -> None:
        self._retention.passed_over = steps

    def expect_links(self, linked_bytes: int) -> None:
        """Set how many bytes the next save links instead of writing them."""
        self._linked_bytes = linked_bytes

    def before_training(self, needed_bytes: int, num_shards: int) -> str:
        """Store what a save needs, and check whether one fits at all. Return a warning, or an empty string.

        Raises NoSpaceError, OSError.
        """
        self._needed_bytes = needed_bytes + _SMALL_BYTES
        self._needed_files = num_shards + _SMALL_FILES
        self._quotas = read_quotas(self._folder)
        prunable = [verdict.step for verdict in self._retention.verdicts() if not verdict.keep]
        verdict = self._look()
        warning = require_one_save(verdict, prunable_bytes=self._freed_by(prunable))
        # On most machines quotas cannot be read, so do not warn of that at every start.
        return "" if verdict.fits else warning

    def move(self, folder: Path, owner: Owner) -> None:
        """Use ``folder``, which belongs to ``owner``."""
        self._folder = self._retention.folder = folder
        self._retention.owner = owner

    def refresh(self) -> None:
        """Read quotas again, which may take seconds. Called on a background thread after each commit."""
        if self._quotas.known:
            self._quotas = read_quotas(self._folder)

    def fits(self) -> bool:
        """Return whether a save fits now. Raises OSError."""
        return self._look().fits

    def make(self, *, stop: Callable[[], bool] = lambda: False) -> Room:
        """Delete what retention allows until one save fits, or until ``stop``. Raises OSError."""
        return make_room(self._look, lambda: self._retention.apply(stop=stop).deleted)

    def _look(self) -> SpaceCheck:
        verdict = self._check()
        if not verdict.fits and self._quotas.known:
            self._quotas = read_quotas(self._folder)  # the last reading is old
            verdict = self._check()
        return verdict

    def _check(self) -> SpaceCheck:
        needed_bytes = self._needed_bytes - self._linked_bytes
        return check(self._folder, needed_bytes, needed_files=self._needed_files, quotas=self._quotas)

    def _freed_by(self, steps: Iterable[int]) -> int:
        """Return the bytes that deleting steps frees, without files that other steps or a fork have too."""
        found: dict[tuple[int, int], list[os.stat_result]] = defaultdict(list)
        for step in steps:
            path = self._folder / paths.step_name(step)
            try:
                stats = [(path / name).stat() for name in manifest.load(path).files]
            except (CheckpointError, OSError):
                continue
            for file in stats:
                found[file.st_dev, file.st_ino].append(file)
        return sum(same[0].st_size for same in found.values() if len(same) >= same[0].st_nlink)


def _existing(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"
