"""Every exception that KempnerForge raises on purpose.

    KempnerForgeError                 exit status 1 unless a subclass says otherwise
    ├── ConfigError                   2  a config or command line that cannot work; carries every fault
    ├── DataError                     2  corrupt, empty, missing or foreign training data
    ├── RunFolderError                2  the run's folder cannot be used (node-local, not writable, foreign)
    │   ├── LeaseHeldError            2  another process is writing this run
    │   └── FolderOwnedError          2  the checkpoint folder belongs to another run
    ├── NoProgressError              76  several attempts ended in faults of their own; told before training
    ├── StopRequestedError           75  asked to stop while it was being set up
    ├── UploadError                   1  metrics could not be brought to wandb
    ├── NonFiniteError                1  too many non-finite steps in a row
    └── CheckpointError               1
        ├── StepNotFoundError         2  a step or path that was asked for by name does not exist
        ├── DamagedCheckpointError    1  structure or digest is wrong, on a second read too
        ├── UnreachableCheckpointError 1 storage did not answer (EIO, ESTALE, missing on one node only)
        ├── MismatchError             2  sound, but it cannot fit this config
        │   └── NoTrainingStateError  2  sound, but weights alone: no run can go on from it
        ├── NoSoundCheckpointError    1  checkpoints exist and none of them loads
        ├── StepsMissingError         2  the run's records know of a committed step, and none is there
        ├── NoSpaceError              2  not even one save would fit; told before training
        ├── LeaseLostError            1  another attempt has taken this run over
        └── SaveFailedError           1  a save failed, or too many in a row
            └── HostMemoryError       1  its host buffers do not fit; at a start a ConfigError says so

Messages say what is wrong, where, and which command to type next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

EXIT_FINISHED = 0
EXIT_FAULT = 1
EXIT_BAD_CONFIG = 2
EXIT_STOPPED = 75
"""Stopped on purpose with work left (preemption, deadline): safe to requeue."""
EXIT_NO_PROGRESS = 76
"""Several attempts in a row ended in faults of their own without progress: do not requeue."""


class KempnerForgeError(Exception):
    """Base of all errors raised on purpose."""

    exit_status = EXIT_FAULT
    """What the process ends with."""

    agreed = False
    """Whether all ranks raise it together, so that rank 0 alone tells it."""


@dataclass(frozen=True)
class ConfigIssue:
    """One thing wrong with a configuration."""

    key: str
    """Dotted name, such as ``train.batch_size``."""
    problem: str
    """What is wrong, the value included."""
    allowed: str = ""
    """What would be accepted, or the nearest known name."""
    source: str = ""
    """Where the value came from: a file, or ``command line``."""

    def __str__(self) -> str:
        parts = [f"{self.key}: {self.problem}"]
        if self.allowed:
            parts.append(self.allowed)
        text = "; ".join(parts)
        return f"{text}  [{self.source}]" if self.source else text


class ConfigError(KempnerForgeError):
    """A configuration that cannot work. Lists every fault at once."""

    exit_status = EXIT_BAD_CONFIG
    agreed = True

    def __init__(self, faults: list[ConfigIssue] | tuple[ConfigIssue, ...], *, where: str = "") -> None:
        self.faults = tuple(faults)
        self.where = where
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        head = f"{where}: {count} in the configuration" if where else f"{count} in the configuration"
        super().__init__("\n".join([head, *(f"  {fault}" for fault in self.faults)]))

    def __reduce__(self) -> tuple[Callable[..., ConfigError], tuple[Any, ...]]:
        return _rebuild_config_error, (self.faults, self.where)


def _rebuild_config_error(faults: tuple[ConfigIssue, ...], where: str) -> ConfigError:
    return ConfigError(faults, where=where)


class DataError(KempnerForgeError):
    """Training data that is corrupt, empty, missing or of another vocabulary."""

    exit_status = EXIT_BAD_CONFIG


class RunFolderError(KempnerForgeError):
    """The run's folder cannot be used by all ranks."""

    exit_status = EXIT_BAD_CONFIG


class LeaseHeldError(RunFolderError):
    """Another process that is alive is writing this run."""


class FolderOwnedError(RunFolderError):
    """The checkpoint folder belongs to another run."""


class NoProgressError(KempnerForgeError):
    """Several attempts ended in a recorded fault of their own without a new committed step."""

    exit_status = EXIT_NO_PROGRESS


class StopRequestedError(KempnerForgeError):
    """The run was asked to stop before its first step, when there was nothing to commit."""

    exit_status = EXIT_STOPPED

    def __init__(self, by: str) -> None:
        self.by = by
        """What asked: the name of a signal, or what the stop file says."""
        super().__init__(by)

    def __str__(self) -> str:
        return f"stopped by {self.by} during set-up, before a step. To go on: the same command"


class UploadError(KempnerForgeError):
    """Metrics could not be brought to wandb; what is on disk is untouched."""


class NonFiniteError(KempnerForgeError):
    """Too many steps in a row had a non-finite loss or gradient."""

    agreed = True


class CheckpointError(KempnerForgeError):
    """Base of all checkpoint errors."""


class StepNotFoundError(CheckpointError):
    """A step or checkpoint path that was asked for by name does not exist."""

    exit_status = EXIT_BAD_CONFIG


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose structure or digests are wrong, on a second read too."""


class UnreachableCheckpointError(CheckpointError):
    """Storage did not answer; the checkpoint itself may be sound."""


class MismatchError(CheckpointError):
    """A sound checkpoint that cannot fit this configuration."""

    exit_status = EXIT_BAD_CONFIG


class NoTrainingStateError(MismatchError):
    """A sound checkpoint that no run can go on from: it has tensors, but no training state."""


class NoSoundCheckpointError(CheckpointError):
    """Checkpoints exist, quarantined ones included, and none of them loads."""


class StepsMissingError(CheckpointError):
    """The run has committed steps by its own records, and its checkpoint folder has none."""

    exit_status = EXIT_BAD_CONFIG


class NoSpaceError(CheckpointError):
    """Not even one save would fit where the checkpoints go."""

    exit_status = EXIT_BAD_CONFIG


class LeaseLostError(CheckpointError):
    """Another attempt has taken this run over, so nothing may be committed any more."""


class SaveFailedError(CheckpointError):
    """A checkpoint could not be written."""

    agreed = True


class HostMemoryError(SaveFailedError):
    """The host buffers of a save do not fit into the memory of a node or a cgroup. Nothing was taken."""

    def __init__(self, fault: ConfigIssue) -> None:
        self.fault = fault
        super().__init__(fault)

    def __str__(self) -> str:
        return str(self.fault)
