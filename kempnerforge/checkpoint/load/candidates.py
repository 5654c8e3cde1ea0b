"""Resuming: rank 0 chooses a step, all ranks load it, and all agree on how that went.

Three things can go wrong, and they are not the same. A *damaged* step is set aside and all ranks go to the
next older one together. An *unreachable* one may be sound: reads are repeated, then the run stops and nothing
is renamed. A *mismatch* means that the config cannot fit: the run stops and says what differs.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tomli

from kempnerforge.checkpoint.format import latest_link, manifest, paths
from kempnerforge.checkpoint.format.json_values import MALFORMED, decode_objects
from kempnerforge.checkpoint.format.manifest import Manifest
from kempnerforge.checkpoint.format.paths import FolderListing
from kempnerforge.checkpoint.load import load_path
from kempnerforge.checkpoint.retention.start_cleanup import StartCleanup
from kempnerforge.checkpoint.run import known_steps
from kempnerforge.checkpoint.run.owner import ANYONE, Owner
from kempnerforge.checkpoint.run.resumable_steps import check_counters, require_training_state
from kempnerforge.checkpoint.run.resume_report import Rejected
from kempnerforge.errors import (
    CheckpointError,
    DamagedCheckpointError,
    NoSoundCheckpointError,
    NoTrainingStateError,
    StepNotFoundError,
    UnreachableCheckpointError,
)

T = TypeVar("T")

FOREIGN = "another run's"
"""The outcome in a receipt of a step that is of another run."""

RETRY_DELAYS_S = (0.5, 1.0, 2.0)
"""Pauses before a read that the storage did not answer is tried again."""


@dataclass(frozen=True)
class Candidate:
    """A step whose manifest, names, sizes and small files are right."""

    path: Path
    step: int
    manifest: Manifest
    config_toml: str = ""


def with_retries(work: Callable[[], T], *, what: str) -> T:
    """Run ``work``, again after a pause while the storage fails to answer.

    Raises UnreachableCheckpointError when it still does not; errors about content pass through.
    """
    for delay_s in (*RETRY_DELAYS_S, None):
        try:
            return work()
        except OSError as error:
            if delay_s is None:
                raise _unreachable(what, str(error)) from error
            time.sleep(delay_s)
    raise AssertionError("unreachable")


class _ForeignStepError(CheckpointError):
    """A step of another run."""


def _unreachable(what: str, error: str) -> UnreachableCheckpointError:
    return UnreachableCheckpointError(
        f"{what} cannot be read: {error}. It may be sound: nothing was renamed. "
        "Check the file system, then start the same command again."
    )


def select(
    folder: Path,
    rejected: list[Rejected],
    suspects: Mapping[int, str] | None = None,
    cleanup: StartCleanup | None = None,
    *,
    owner: Owner = ANYONE,
    in_the_way: Callable[[FolderListing], list[Path]] = known_steps.set_aside,
) -> Candidate | None:
    """The newest step that looks sound; damaged ones on the way are set aside into ``rejected``.

    Rank 0 only. Reads manifests and small files, no shards. Raises NoSoundCheckpointError when there are
    checkpoints, quarantined ones included, and none is left, so that a run never quietly begins again.
    ``in_the_way`` says which of those that were set aside count for that. Steps that ``owner`` does not own
    are passed over and left as they are.
    ``suspects``, with reasons, are set aside when an older sound step exists; else the newest is tried again.
    ``cleanup`` sets steps aside, and knows which ones it could not rename: these are passed over.
    """
    cleanup = cleanup or StartCleanup(folder)
    listing = with_retries(lambda: paths.list_folder(folder), what=str(folder))
    passed: list[Candidate] = []
    for step in listing.steps:
        if step in cleanup.passed_over:
            continue
        path = folder / paths.step_name(step)
        if step in cleanup.unreadable:
            raise _unreachable(str(path), cleanup.unreadable[step])
        try:
            found = with_retries(
                lambda path=path, step=step: inspect(path, step=step, owner=owner), what=str(path)
            )
        except DamagedCheckpointError as error:
            if run_id := owner.foreign_run(path):
                _pass_over(rejected, Rejected(step, FOREIGN, f"it is of run {run_id}"))
                continue
            rejected.append(quarantine(cleanup, step, str(error)))
            continue
        except _ForeignStepError as error:
            _pass_over(rejected, Rejected(step, FOREIGN, str(error)))
            continue
        except NoTrainingStateError as error:
            rejected.append(Rejected(step, "no training state", str(error)))
            continue
        if step in (suspects or {}):
            passed.append(found)
            continue
        for one in passed:
            rejected.append(_step_over(cleanup, one.step, (suspects or {})[one.step]))
        return found
    if passed:
        return passed[0]
    set_aside, own = in_the_way(listing), [one for one in rejected if one.outcome != FOREIGN]
    if own or set_aside or cleanup.passed_over:
        names = [one.moved_to for one in own if one.moved_to] or [path.name for path in set_aside]
        names += [paths.step_name(step) for step in cleanup.passed_over]
        reasons = "".join(f"\n  {one.reason}" for one in own)
        raise NoSoundCheckpointError(
            f"no sound checkpoint is left in {folder}; set aside: {', '.join(names) or 'none'}.{reasons}\n"
            "To begin again at step 0 on purpose: kempnerforge ckpt rollback RUN 0, or give the run another "
            "name (--run.name=NEW)."
        )
    return None


def _pass_over(rejected: list[Rejected], one: Rejected) -> None:
    if one not in rejected:  # an older step is chosen again after damage
        rejected.append(one)


def inspect(path: Path, *, step: int | None = None, owner: Owner = ANYONE) -> Candidate:
    """Check manifest, names, sizes and the digests of all small files.

    With ``step`` it has to be that step of a run, to go on from. Raises DamagedCheckpointError, MismatchError
    for another format, NoTrainingStateError, OSError.
    """
    found = manifest.load(path, step=step)
    if not owner.owns(found.provenance):
        raise _ForeignStepError(f"it is of run {found.provenance.run_id}")
    small = {
        name: manifest.read_verified(path, found, name)
        for name in found.files
        if not name.endswith(paths.SHARD_SUFFIX) and name != paths.INDEX
    }
    try:
        config_toml = small.get(paths.CONFIG, b"").decode()
        tomli.loads(config_toml)
        objects = decode_objects(small[paths.TRAIN_STATE])
        check_counters(objects, step=found.provenance.step)
    except MALFORMED as error:
        raise DamagedCheckpointError(
            f"{path.name} is damaged: its small files make no sense ({error})"
        ) from None
    if step is not None:
        require_training_state(path, objects)
    return Candidate(path, found.provenance.step or 0, found, config_toml)


def quarantine(cleanup: StartCleanup, step: int, reason: str) -> Rejected:
    """Set a damaged step aside under another name. It is never deleted. Rank 0 only."""
    moved_to = cleanup.set_aside(step, "damaged", paths.quarantine_name)
    return Rejected(step, "damaged", reason, moved_to)


def _step_over(cleanup: StartCleanup, step: int, reason: str) -> Rejected:
    """Set aside a sound step that two attempts blame. It is never deleted. Rank 0 only."""
    moved_to = cleanup.set_aside(step, "suspect", paths.suspect_name)
    why = f"attempts went on from it and ended for a cause that may lie in it: {reason}"
    return Rejected(step, "suspect", why, moved_to)


def find_warm_start(path: Path) -> Candidate:
    """The checkpoint at ``path``: a step's folder, a folder of steps, or a run's folder (newest step).

    Rank 0 only. Nothing of another run is ever renamed: damage is an error here. Raises StepNotFoundError,
    DamagedCheckpointError, UnreachableCheckpointError.
    """
    path = with_retries(lambda: latest_link.resolve(path), what=str(path.parent))
    try:
        steps = load_path.candidates(path)
    except StepNotFoundError as error:
        raise StepNotFoundError(f"checkpoint.load_path: {error}") from None
    for found in steps:
        step = None if found == path else paths.step_number(found.name)
        with contextlib.suppress(NoTrainingStateError):  # named by its own path, it can be loaded
            return with_retries(functools.partial(inspect, found, step=step), what=str(found))
    raise StepNotFoundError(
        f"checkpoint.load_path: {path} has steps of weights alone; name one of them, such as {steps[0]}"
    )


def damaged_warm_start(found: Candidate, reason: str) -> DamagedCheckpointError:
    """The error for a warm start whose source turned out damaged on some rank."""
    return DamagedCheckpointError(
        f"checkpoint.load_path: {reason}. It was left as it is; choose another step of that run."
    )
