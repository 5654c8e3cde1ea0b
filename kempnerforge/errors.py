"""All exceptions that KempnerForge raises deliberately.

    KempnerForgeError                 exit status 1 unless a subclass sets another one
    ├── ConfigError                   2  invalid config or command line; lists all issues
    ├── DataError                     2  corrupt, empty or missing data, or data of another vocabulary
    ├── RunFolderError                2  unusable run folder (node-local, not writable, of another run)
    │   ├── LeaseHeldError            2  another process is writing this run
    │   └── FolderOwnedError          2  the checkpoint folder belongs to another run
    ├── NoProgressError              76  several attempts failed without progress; raised before training
    ├── StopRequestedError           75  a stop was requested during setup
    ├── UploadError                   1  metrics could not be uploaded to wandb
    ├── NonFiniteError                1  too many non-finite steps in a row
    ├── HookError                     1  a hook of the user's raised an exception
    ├── PluginError                   1  a dataset or a model of the user's raised an error or is unusable
    └── CheckpointError               1
        ├── StepNotFoundError         2  a step or path given by name does not exist
        ├── DamagedCheckpointError    1  wrong structure or digest, confirmed by a second read
        ├── UnreachableCheckpointError 1 storage did not answer (EIO, ESTALE, missing on one node only)
        ├── MismatchError             2  intact, but does not fit this config
        │   └── NoTrainingStateError  2  intact, but weights only: a run cannot resume from it
        ├── NoSoundCheckpointError    1  checkpoints exist, but none of them loads
        ├── StepsMissingError         2  the run recorded a committed step, but the folder has none
        ├── NoSpaceError              2  there is no space for a single save; raised before training
        ├── LeaseLostError            1  another attempt has taken over this run
        └── SaveFailedError           1  a save failed, or too many in a row
            └── HostMemoryError       1  the host buffers do not fit (ConfigError at the start of a run)

Messages state what is wrong, where, and which command to run next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

EXIT_FINISHED = 0
EXIT_FAULT = 1
EXIT_BAD_CONFIG = 2
EXIT_STOPPED = 75
"""Stopped deliberately before the last step (preemption, deadline): safe to requeue."""
EXIT_NO_PROGRESS = 76
"""Several attempts in a row failed because of their own errors and made no progress: do not requeue."""


class KempnerForgeError(Exception):
    """Base class of all errors raised deliberately."""

    exit_status = EXIT_FAULT
    """Exit status of the process."""

    agreed = False
    """Whether all ranks raise the error together, so that only rank 0 prints it."""


@dataclass(frozen=True)
class ConfigIssue:
    """One issue of a configuration."""

    key: str
    """Dotted name, such as ``train.batch_size``."""
    problem: str
    """What is wrong, including the value."""
    allowed: str = ""
    """Accepted values, or the closest known name."""
    source: str = ""
    """Where the value comes from: a file, or ``command line``."""

    def __str__(self) -> str:
        parts = [f"{self.key}: {self.problem}"]
        if self.allowed:
            parts.append(self.allowed)
        text = "; ".join(parts)
        return f"{text}  [{self.source}]" if self.source else text


class ConfigError(KempnerForgeError):
    """An invalid configuration. Lists all issues at once; a single one without ``where`` is one line."""

    exit_status = EXIT_BAD_CONFIG
    agreed = True

    def __init__(self, faults: list[ConfigIssue] | tuple[ConfigIssue, ...], *, where: str = "") -> None:
        self.faults = tuple(faults)
        self.where = where
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        head = f"{where}: {count} in the configuration" if where else f"{count} in the configuration"
        is_line = len(self.faults) == 1 and not where
        lines = self.faults if is_line else [head, *(f"  {fault}" for fault in self.faults)]
        super().__init__("\n".join(map(str, lines)))

    def __reduce__(self) -> tuple[Callable[..., ConfigError], tuple[Any, ...]]:
        return _rebuild_config_error, (self.faults, self.where)


def _rebuild_config_error(faults: tuple[ConfigIssue, ...], where: str) -> ConfigError:
    return ConfigError(faults, where=where)


class DataError(KempnerForgeError):
    """Training data that is corrupt, empty, missing or does not match the model's vocabulary."""

    exit_status = EXIT_BAD_CONFIG


class RunFolderError(KempnerForgeError):
    """The run's folder cannot be used by all ranks."""

    exit_status = EXIT_BAD_CONFIG


class LeaseHeldError(RunFolderError):
    """Another live process is writing this run."""


class FolderOwnedError(RunFolderError):
    """The checkpoint folder belongs to another run."""


class NoProgressError(KempnerForgeError):
    """Several attempts in a row recorded errors of their own and committed no new step."""

    exit_status = EXIT_NO_PROGRESS


class StopRequestedError(KempnerForgeError):
    """A stop was requested before the first step, when there was nothing to commit."""

    exit_status = EXIT_STOPPED

    def __init__(self, by: str) -> None:
        self.by = by
        """What requested the stop: the name of a signal, or the content of the stop file."""
        super().__init__(by)

    def __str__(self) -> str:
        return f"stopped by {self.by} during setup, before a step. Run the same command to resume"


class UploadError(KempnerForgeError):
    """Metrics could not be uploaded to wandb. The files on disk are not changed."""


class NonFiniteError(KempnerForgeError):
    """Too many steps in a row had a non-finite loss or gradient."""

    agreed = True


class HookError(KempnerForgeError):
    """A hook raised an exception. A save that was due is committed."""


class PluginError(KempnerForgeError):
    """A dataset of the user's raised an error, or it or ``loss(batch)`` returned something unusable."""


class CheckpointError(KempnerForgeError):
    """Base class of all checkpoint errors."""


class StepNotFoundError(CheckpointError):
    """A step or checkpoint path that was given by name does not exist."""

    exit_status = EXIT_BAD_CONFIG


class DamagedCheckpointError(CheckpointError):
    """A checkpoint with a wrong structure or wrong digests, confirmed by a second read."""


class UnreachableCheckpointError(CheckpointError):
    """Storage did not answer. The checkpoint itself may be intact."""


class MismatchError(CheckpointError):
    """An intact checkpoint that does not fit this configuration."""

    exit_status = EXIT_BAD_CONFIG


class NoTrainingStateError(MismatchError):
    """An intact checkpoint from which no run can resume: it has tensors, but no training state."""


class NoSoundCheckpointError(CheckpointError):
    """Checkpoints exist, possibly only quarantined ones, but none of them loads."""


class StepsMissingError(CheckpointError):
    """The run's records list committed steps, but its checkpoint folder has none."""

    exit_status = EXIT_BAD_CONFIG


class NoSpaceError(CheckpointError):
    """The checkpoint folder has no space for a single save."""

    exit_status = EXIT_BAD_CONFIG


class LeaseLostError(CheckpointError):
    """Another attempt has taken over this run. This one must not commit any more steps."""


class SaveFailedError(CheckpointError):
    """A checkpoint could not be written."""

    agreed = True


class HostMemoryError(SaveFailedError):
    """The host buffers of a save do not fit into the memory of a node or a cgroup. None was allocated."""

    def __init__(self, fault: ConfigIssue) -> None:
        self.fault = fault
        super().__init__(fault)

    def __str__(self) -> str:
        return str(self.fault)
