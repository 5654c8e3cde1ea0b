"""Resuming: rank 0 chooses a step, all ranks load it, and all agree on how that went.

Three things can go wrong, and they are not the same. A *damaged* step is set aside and all ranks go to the
next older one together. An *unreachable* one may be sound: reads are repeated, then the run stops and nothing
is renamed. A *mismatch* means that the config cannot fit: the run stops and says what differs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import tomli
import torch

from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.format.dtypes import DTYPES
from kempnerforge.checkpoint.format.json_values import MALFORMED, decode_objects
from kempnerforge.checkpoint.format.manifest import Manifest
from kempnerforge.checkpoint.format.paths import FolderListing
from kempnerforge.checkpoint.load.compatibility import check_parts
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors
from kempnerforge.checkpoint.load.load_targets import LoadTargets, find_targets
from kempnerforge.checkpoint.results import RunContext
from kempnerforge.checkpoint.retention.start_cleanup import StartCleanup
from kempnerforge.checkpoint.run import known_steps
from kempnerforge.checkpoint.run.owner import ANYONE, Owner
from kempnerforge.checkpoint.run.resumable_steps import check_counters, require_training_state
from kempnerforge.checkpoint.run.resume_report import Rejected
from kempnerforge.checkpoint.state.train_state import TrainState, rng_name
from kempnerforge.distributed.consensus import ControlGroup, mark_collective
from kempnerforge.errors import (
    CheckpointError,
    DamagedCheckpointError,
    MismatchError,
    NoSoundCheckpointError,
    NoTrainingStateError,
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


@dataclass
class LoadResult:
    """What one rank took from a step; nothing but tensors is applied before all ranks agree."""

    reader: SafetensorsReader
    targets: LoadTargets
    rng: torch.Tensor | None = None
    data_changes: list[str] = field(default_factory=list)
    load_s: float = 0.0


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
            found = _inspect_twice(path, step, owner)
        except DamagedCheckpointError as error:
            if run_id := with_retries(lambda path=path: owner.foreign_run(path), what=str(path)):
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


def _inspect_twice(path: Path, step: int, owner: Owner) -> Candidate:
    """``inspect``; damage counts only if a second look finds it too.

    A network file system may not show a file for a moment, and a quarantine throws the step off the timeline.
    """
    try:
        return with_retries(lambda: inspect(path, step=step, owner=owner), what=str(path))
    except DamagedCheckpointError:
        time.sleep(RETRY_DELAYS_S[0])
        return with_retries(lambda: inspect(path, step=step, owner=owner), what=str(path))


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


def load(
    found: Candidate,
    state: TrainState,
    *,
    same_layout: bool,
    rank: int,
    num_ranks: int = 1,
    parts: Sequence[str],
    excluded: Collection[str] = (),
    context: RunContext,
) -> LoadResult:
    """Read what this rank needs, after checking that it fits.

    ``parts`` of model, optimizer, extra, data, rng; ``excluded``: names of extras. The tensors of the model
    are filled in place where they can be; nothing else of ``state`` changes. Not collective. Raises
    DamagedCheckpointError, UnreachableCheckpointError, MismatchError.
    """

    def read() -> LoadResult:
        started = time.perf_counter()
        with contextlib.closing(SafetensorsReader(found.path, known_manifest=found.manifest)) as reader:
            _ = reader.objects  # decoded here, so that an error is raised before the ranks agree
            check_parts(parts, reader)
            targets = find_targets(
                state, reader, parts=parts, excluded=excluded, rank=rank, num_ranks=num_ranks
            )
            loaded = LoadResult(reader, targets)
            if "data" in parts:
                loaded.data_changes = _data_changes(reader, state, context)
            wanted, name = dict(targets.tensors), rng_name(rank)
            if "rng" in parts and same_layout and name in reader.index:
                entry = reader.index[name]
                loaded.rng = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="cpu")
                wanted[name] = loaded.rng
            load_tensors(wanted, reader)
            targets.check_tied()
        loaded.load_s = time.perf_counter() - started
        return loaded

    return with_retries(read, what=str(found.path))


def _data_changes(reader: SafetensorsReader, state: TrainState, context: RunContext) -> list[str]:
    try:
        stored = reader.objects["data"]["fingerprint"]
    except (KeyError, TypeError):
        raise MismatchError(f"{reader.path} was saved without a position in the data") from None
    changes = context.explain_data(stored, state.fingerprint)
    if changes and not context.allow_changed_data:
        raise MismatchError(
            f"{reader.path} was trained on other data:\n  "
            + "\n  ".join(changes)
            + "\nTo go on with the data of this config, add --data.allow_changed=true"
        )
    return changes


def load_together(work: Callable[[], LoadResult], control: ControlGroup) -> LoadResult | str:
    """Run ``work`` on every rank and agree on the outcome.

    Collective: all ranks, on the control group. Returns what this rank loaded, or, on all ranks, the reason
    why the step is damaged; raises the same error on all ranks for the other outcomes.
    """
    loaded: LoadResult | None = None
    failure: tuple[str, str] | None = None
    cause: BaseException | None = None
    try:
        loaded = work()
    except CheckpointError as error:
        failure, cause = (type(error).__name__, str(error)), error.__cause__
    except Exception as error:  # noqa: BLE001 - the other ranks wait in the gather below
        failure, cause = ("Exception", f"{type(error).__name__}: {error}"), error
    worst = most_severe(control.gather(failure))
    if worst is None:
        assert loaded is not None
        return loaded
    kind, message = worst
    if kind == "DamagedCheckpointError":
        return message
    types = {"MismatchError": MismatchError, "UnreachableCheckpointError": UnreachableCheckpointError}
    raise mark_collective(types.get(kind, CheckpointError)(message)) from cause


def most_severe(outcomes: Sequence[tuple[str, str] | None]) -> tuple[str, str] | None:
    """What all ranks act on: a fault before unreachable before mismatch before damaged; None if all loaded.

    Damage comes last because it renames: that must not happen while a rank could not even read.
    """
    order = ("Exception", "UnreachableCheckpointError", "MismatchError", "DamagedCheckpointError")
    found = [
        (order.index(one[0]) if one[0] in order else 0, rank, one) for rank, one in enumerate(outcomes) if one
    ]
    if not found:
        return None
    _, rank, (kind, message) = min(found)
    return kind, f"{message} (rank {rank})" if len(outcomes) > 1 else message
