"""Choose the step to resume from, inspect it, and quarantine damaged ones. First rank only.

Three kinds of faults are distinguished:

- A *damaged* step is renamed, and all ranks try the next older one together.
- An *unreachable* step may be intact. Reads are retried; then the run stops, and nothing is
  renamed.
- A *mismatch* means that the config does not fit the step. The run stops and names the differences.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tomli

from kempnerforge.checkpoint.format import latest_link, manifest, paths
from kempnerforge.checkpoint.format.json_values import MALFORMED, decode_objects
from kempnerforge.checkpoint.format.manifest import Manifest
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

log = logging.getLogger(__name__)

T = TypeVar("T")

FOREIGN = "another run's"
"""The outcome in a receipt for a step of another run."""

RETRY_DELAYS_S = (0.5, 1.0, 2.0)
"""Pauses between attempts to read storage that does not answer."""


@dataclass(frozen=True)
class Candidate:
    """A step whose manifest, file names, file sizes and small files are correct."""

    path: Path
    step: int
    manifest: Manifest
    config_toml: str = ""


def with_retries(work: Callable[[], T], *, what: str) -> T:
    """Run ``work``, and repeat it after pauses while it raises OSError.

    Raises UnreachableCheckpointError after the last attempt. Other errors pass through.
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
    """The step belongs to another run."""


def _unreachable(what: str, error: str) -> UnreachableCheckpointError:
    return UnreachableCheckpointError(
        f"{what} cannot be read: {error}. It may be intact: nothing was renamed. "
        "Check the file system, then run the same command again."
    )


def select(
    folder: Path,
    rejected: list[Rejected],
    suspects: Mapping[int, str] | None = None,
    cleanup: StartCleanup | None = None,
    *,
    owner: Owner = ANYONE,
    run_dir: Path | None = None,
) -> Candidate | None:
    """Return the newest step that looks sound; None if there is no checkpoint at all.

    Reads manifests and small files, but no shards. Damaged steps are quarantined and appended to
    ``rejected``. Steps that ``owner`` does not own are left as they are.

    Args:
        folder: the folder of checkpoints.
        rejected: steps rejected so far; this call appends to it.
        suspects: steps from which two attempts resumed and failed, with reasons. They are set aside
            if an older sound step exists; otherwise the newest of them is tried again.
        cleanup: renames steps. Steps that it could not rename are skipped.
        owner: the run that the folder belongs to.
        run_dir: the run's folder. If a rollback to step 0 is recorded there, the steps that it set
            aside do not count as checkpoints.

    Raises NoSoundCheckpointError if checkpoints exist, quarantined ones included, but none is
    usable: a run must never restart at step 0 unnoticed. Raises UnreachableCheckpointError.
    """
    cleanup, suspects = cleanup or StartCleanup(folder), suspects or {}
    listing = with_retries(lambda: paths.list_folder(folder), what=str(folder))
    log.debug("steps in %s: %s", folder, listing.steps)
    newer_suspects: list[Candidate] = []
    for step in listing.steps:
        if step in cleanup.passed_over:
            continue
        path = folder / paths.step_name(step)
        if step in cleanup.unreadable:
            raise _unreachable(str(path), cleanup.unreadable[step])
        try:
            look = functools.partial(inspect, path, step=step, owner=owner)
            candidate = manifest.confirm_damage(
                functools.partial(with_retries, look, what=str(path)), pause_s=RETRY_DELAYS_S[0]
            )
        except DamagedCheckpointError as error:
            log.debug("step %d is damaged: %s", step, error)
            if run_id := with_retries(functools.partial(owner.foreign_run, path), what=str(path)):
                _reject_once(rejected, Rejected(step, FOREIGN, _belongs_to(run_id)))
            else:
                rejected.append(quarantine(cleanup, step, str(error)))
            continue
        except _ForeignStepError as error:
            log.debug("step %d is skipped: %s", step, error)
            _reject_once(rejected, Rejected(step, FOREIGN, str(error)))
            continue
        except NoTrainingStateError as error:
            log.debug("step %d is skipped: %s", step, error)
            rejected.append(Rejected(step, "no training state", str(error)))
            continue
        log.debug("step %d has a valid manifest%s", step, ", but is suspect" if step in suspects else "")
        if step in suspects:
            newer_suspects.append(candidate)
            continue
        rejected += [
            _set_suspect_aside(cleanup, suspect.step, suspects[suspect.step]) for suspect in newer_suspects
        ]
        return candidate
    if newer_suspects:
        return newer_suspects[0]
    set_aside = known_steps.in_the_way(listing, run_dir)
    _require_no_checkpoints(folder, rejected, set_aside, cleanup)
    return None


def _require_no_checkpoints(
    folder: Path, rejected: list[Rejected], set_aside: list[Path], cleanup: StartCleanup
) -> None:
    """Raise NoSoundCheckpointError if ``folder`` has, or had, checkpoints of this run."""
    own = [rejection for rejection in rejected if rejection.outcome != FOREIGN]
    if not (own or set_aside or cleanup.passed_over):
        return
    names = [rejection.moved_to for rejection in own if rejection.moved_to]
    names = names or [path.name for path in set_aside]
    names += [paths.step_name(step) for step in cleanup.passed_over]
    reasons = "".join(f"\n  {rejection.reason}" for rejection in own)
    raise NoSoundCheckpointError(
        f"no sound checkpoint is left in {folder}; set aside: {', '.join(names) or 'none'}.{reasons}\n"
        "To restart at step 0: kempnerforge ckpt rollback RUN 0, or give the run another name "
        "(--run.name=NEW)."
    )


def _reject_once(rejected: list[Rejected], rejection: Rejected) -> None:
    if rejection not in rejected:  # ``select`` searches again after a step was found damaged
        rejected.append(rejection)


def _belongs_to(run_id: str) -> str:
    return f"it belongs to run {run_id}"


def inspect(path: Path, *, step: int | None = None, owner: Owner = ANYONE) -> Candidate:
    """Check the manifest, file names and sizes, and the digests of all small files.

    With ``step``, also check that it is this step of a run and that a run can resume from it.
    Raises DamagedCheckpointError, MismatchError for another format version, NoTrainingStateError,
    OSError.
    """
    step_manifest = manifest.load(path, step=step)
    if not owner.owns(step_manifest.provenance):
        raise _ForeignStepError(_belongs_to(step_manifest.provenance.run_id))
    small = {
        name: manifest.read_verified(path, step_manifest, name)
        for name in step_manifest.files
        if not name.endswith(paths.SHARD_SUFFIX) and name != paths.INDEX
    }
    try:
        config_toml = small.get(paths.CONFIG, b"").decode()
        tomli.loads(config_toml)
        objects = decode_objects(small[paths.TRAIN_STATE])
        check_counters(objects, step=step_manifest.provenance.step)
    except MALFORMED as error:
        raise DamagedCheckpointError(
            f"{path.name} is damaged: its small files cannot be decoded ({error})"
        ) from None
    if step is not None:
        require_training_state(path, objects)
    return Candidate(path, step_manifest.provenance.step or 0, step_manifest, config_toml)


def quarantine(cleanup: StartCleanup, step: int, reason: str) -> Rejected:
    """Rename a damaged step so that no resume chooses it. Never deletes it."""
    moved_to = cleanup.set_aside(step, "damaged", paths.quarantine_name)
    return Rejected(step, "damaged", reason, moved_to)


def _set_suspect_aside(cleanup: StartCleanup, step: int, reason: str) -> Rejected:
    """Rename a sound step from which two attempts resumed and failed. Never deletes it."""
    moved_to = cleanup.set_aside(step, "suspect", paths.suspect_name)
    why = f"attempts resumed from it and failed, and it may be the cause: {reason}"
    return Rejected(step, "suspect", why, moved_to)


def find_warm_start(path: Path) -> Candidate:
    """Return the checkpoint that ``checkpoint.load_path`` names.

    ``path`` is a step's folder, or a folder of steps or a run's folder, of which the newest step is
    used. A damaged step is an error here: it is not renamed, because it belongs to another run.
    Raises StepNotFoundError, DamagedCheckpointError, UnreachableCheckpointError.
    """
    path = with_retries(lambda: latest_link.resolve(path), what=str(path.parent))
    try:
        step_folders = load_path.candidates(path)
    except StepNotFoundError as error:
        raise StepNotFoundError(f"checkpoint.load_path: {error}") from None
    for step_folder in step_folders:
        step = None if step_folder == path else paths.step_number(step_folder.name)
        with contextlib.suppress(NoTrainingStateError):  # it can be loaded only by its own path
            return with_retries(functools.partial(inspect, step_folder, step=step), what=str(step_folder))
    raise StepNotFoundError(
        f"checkpoint.load_path: the steps in {path} hold only weights; name one of them, such as "
        f"{step_folders[0]}"
    )


def damaged_warm_start(reason: str) -> DamagedCheckpointError:
    """Return the error for a ``load_path`` that some rank found damaged."""
    return DamagedCheckpointError(
        f"checkpoint.load_path: {reason}. Nothing was renamed. Choose another step of that run."
    )
