"""Room for the next save of one run: looked for before training, after and before saves. First rank only."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.retention import disk_space
from kempnerforge.checkpoint.retention.disk_space import Room, Verdict
from kempnerforge.checkpoint.retention.policy import KeepPolicy
from kempnerforge.checkpoint.retention.pruner import Retention
from kempnerforge.checkpoint.retention.quota import Quotas, read_quotas
from kempnerforge.checkpoint.run.owner import Owner
from kempnerforge.config.schema import CheckpointConfig
from kempnerforge.errors import CheckpointError

_SMALL_FILES = 4
"""Beside the shards: index, train state, config, manifest."""
_SMALL_BYTES = 1 << 18


class DiskSpaceGuard:
    """Knows what a save needs, and deletes early what would go after it anyway."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self._folder = folder
        # The save that needs the room becomes the newest of the last N itself.
        before = config.model_copy(update={"keep_last_n": max(1, config.keep_last_n - 1)})
        self._retention = Retention(folder, KeepPolicy.from_config(before))
        self._quotas = Quotas()
        self._needed_bytes = 0
        self._needed_files = 0

    @property
    def passed_over(self) -> Collection[int]:
        """See ``Retention.passed_over``."""
        return self._retention.passed_over

    @passed_over.setter
    def passed_over(self, steps: Collection[int]) -> None:
        self._retention.passed_over = steps

    def before_training(self, needed_bytes: int, num_shards: int) -> str:
        """Take note of what a save needs and look whether one fits at all; returns a warning or nothing.

        Raises NoSpaceError, OSError.
        """
        self._needed_bytes = needed_bytes + _SMALL_BYTES
        self._needed_files = num_shards + _SMALL_FILES
        self._quotas = read_quotas(self._folder)
        prunable = [verdict.step for verdict in self._retention.verdicts() if not verdict.keep]
        verdict = self._look()
        warning = disk_space.require_one_save(verdict, prunable_bytes=sum(map(self._size_of, prunable)))
        # That quotas cannot be read is the rule on most machines, and no news at every start.
        return "" if verdict.fits else warning

    def move(self, folder: Path, owner: Owner) -> None:
        """Look in ``folder``, which is ``owner``'s."""
        self._folder = self._retention.folder = folder
        self._retention.owner = owner

    def refresh(self) -> None:
        """Read quotas again, which may take seconds: on a background thread, after each commit."""
        if self._quotas.known:
            self._quotas = read_quotas(self._folder)

    def fits(self) -> bool:
        """Look whether a save fits as things are. Raises OSError."""
        return self._look().fits

    def make(self, *, stop: Callable[[], bool] = lambda: False) -> Room:
        """Make room for one save, as far as retention allows, until ``stop``. Raises OSError."""
        return disk_space.make_room(self._look, lambda: self._retention.apply(stop=stop).deleted)

    def _look(self) -> Verdict:
        verdict = self._check()
        if not verdict.fits and self._quotas.known:
            self._quotas = read_quotas(self._folder)  # what it said is old by now
            verdict = self._check()
        return verdict

    def _check(self) -> Verdict:
        return disk_space.check(
            self._folder, self._needed_bytes, needed_files=self._needed_files, quotas=self._quotas
        )

    def _size_of(self, step: int) -> int:
        """Bytes that its deletion frees: not those that a fork has links to."""
        path = self._folder / paths.step_name(step)
        try:
            files = manifest.load(path).files
            return sum(one.size_bytes for name, one in files.items() if (path / name).stat().st_nlink == 1)
        except (CheckpointError, OSError):
            return 0
