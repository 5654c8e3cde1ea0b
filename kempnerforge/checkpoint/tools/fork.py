"""Create a new run from a checkpoint of another run, which is not changed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import tomli

from kempnerforge import fsio
from kempnerforge.checkpoint.format import latest_link, manifest, paths
from kempnerforge.checkpoint.format.checksums import FileRecord, VerifiedFile
from kempnerforge.checkpoint.format.json_values import decode_objects
from kempnerforge.checkpoint.format.manifest import Manifest
from kempnerforge.checkpoint.retention import read_locks
from kempnerforge.checkpoint.run import claim, metadata, owner
from kempnerforge.checkpoint.run.metadata import Parent
from kempnerforge.checkpoint.run.owner import OWNER_FILE
from kempnerforge.checkpoint.run.resumable_steps import require_training_state
from kempnerforge.checkpoint.tools import staged_dir
from kempnerforge.errors import NoTrainingStateError, RunFolderError, StepNotFoundError

Progress = Callable[[int, int], None]
"""Called with the bytes done so far, and the total."""

CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
"""Errors after which files are copied instead: another file system or owner, too many links, no
hard links."""


@dataclass(frozen=True)
class Forked:
    """Result of a fork."""

    run_dir: Path
    run_id: str
    step: int
    parent: Parent
    size_bytes: int
    linked_files: int
    """Number of files that share their bytes with the parent's. The others were copied."""
    copied_files: int


def fork(step_folder: Path, run_dir: Path, *, link: bool, progress: Progress) -> Forked:
    """Create ``run_dir`` as the folder of a new run whose only checkpoint is ``step_folder``.

    Every byte is verified. With ``link``, files are hard-linked where possible. The folder is
    created under a hidden name beside ``run_dir`` and then renamed, so it is complete and durable
    when it appears. The parent is not changed. A step that a rollback set aside can be forked too.
    Retention does not delete the step meanwhile.

    Raises StepNotFoundError, DamagedCheckpointError, NoSpaceError, RunFolderError.
    """
    step_folder, run_dir = step_folder.resolve(), Path(os.path.abspath(run_dir))
    found, step = _read_parent(step_folder)
    with read_locks.lock_for_reading(step_folder, what="kempnerforge ckpt fork"):
        try:
            with staged_dir.begin(run_dir, what="fork", purpose="a new run's folder") as building:
                if not link or not _can_link(step_folder, found, building):
                    staged_dir.require_room(
                        building,
                        found.size_bytes,
                        len(found.files),
                        what="fork",
                        hint=", or link the files (--link)",
                    )
                forked = _fill(step_folder, found, step, building, run_dir, link=link, progress=progress)
                fsio.publish(building, run_dir)
        except OSError as error:
            raise RunFolderError(f"{step_folder} could not be forked into {run_dir}: {error}") from error
    return replace(forked, run_dir=run_dir)


def _read_parent(step_folder: Path) -> tuple[Manifest, int]:
    if not (step_folder / paths.MANIFEST).is_file():
        raise StepNotFoundError(
            f"{step_folder} is not a committed checkpoint: it has no {paths.MANIFEST}. Give a step's folder, "
            "such as RUN/checkpoints/step_00001000"
        )
    try:
        found = manifest.load(step_folder, step=paths.step_number(step_folder.name))
    except OSError as error:
        raise RunFolderError(f"{step_folder} cannot be read: {error}") from error
    if found.provenance.step is None:
        raise StepNotFoundError(f"{step_folder} was not saved by a run: its manifest names no step")
    objects = decode_objects(manifest.read_verified(step_folder, found, paths.TRAIN_STATE))
    try:
        require_training_state(step_folder, objects)
    except NoTrainingStateError as error:
        raise NoTrainingStateError(
            f"{error}. To start a new run from its weights: checkpoint.load_path = '{step_folder}'"
        ) from None
    return found, found.provenance.step


def _fill(
    step_folder: Path,
    found: Manifest,
    step: int,
    building: Path,
    run_dir: Path,
    *,
    link: bool,
    progress: Progress,
) -> Forked:
    target = building / "checkpoints" / paths.step_name(step)
    fsio.make_folder(target)
    done_bytes, linked = 0, 0

    def advance(size_bytes: int) -> None:
        nonlocal done_bytes
        done_bytes += size_bytes
        progress(done_bytes, found.size_bytes)

    for name, record in found.files.items():
        linked += _take_file(step_folder / name, target / name, record, link=link, advance=advance)
    # The manifest's own digest has been verified. Write it last, as in a commit.
    fsio.write_new_file(target / paths.MANIFEST, (step_folder / paths.MANIFEST).read_bytes())
    fsio.fsync_folder(target)
    latest_link.point(target.parent, step)  # for convenience: the new run creates it at its first start
    parent = Parent(found.provenance.run_id, step, str(step_folder))
    record = metadata.new(parent=parent, global_batch_size=_global_batch_size(step_folder, found))
    metadata.write(building, record)
    mine = claim.claimant(record, run_dir, run_dir.name)
    fsio.write_new_file(target.parent / OWNER_FILE, owner.encode(mine))
    fsio.fsync_folder(target.parent)
    return Forked(building, record.run_id, step, parent, found.size_bytes, linked, len(found.files) - linked)


def _take_file(
    source: Path, target: Path, record: FileRecord, *, link: bool, advance: Callable[[int], None]
) -> bool:
    """Link or copy one file, verifying it. Return True for a link. Durable, except the name."""
    with VerifiedFile(source, record) as file:
        if link and _link(source, target):
            for part in file.parts(0, record.size_bytes):
                advance(part.nbytes)
            return True
        fd = fsio.open_file(target, os.O_WRONLY | os.O_EXCL)
        try:
            for part in file.parts(0, record.size_bytes):
                fsio.write_all(fd, part)
                advance(part.nbytes)
            os.fsync(fd)
        finally:
            os.close(fd)
    return False


def _can_link(step_folder: Path, found: Manifest, building: Path) -> bool:
    """Return whether files of the step can be hard-linked into ``building``. Try one."""
    probe = building / ".link"
    is_linked = _link(step_folder / next(iter(found.files)), probe)
    probe.unlink(missing_ok=True)
    return is_linked


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in CANNOT_LINK:
            raise
        return False
    return True


def _global_batch_size(step_folder: Path, found: Manifest) -> int:
    """Return the parent's global batch size, for configs that do not set it; 0 if unknown."""
    if paths.CONFIG not in found.files:
        return 0
    try:
        config = tomli.loads(manifest.read_verified(step_folder, found, paths.CONFIG).decode())
        return int(config["train"]["global_batch_size"])
    except (KeyError, TypeError, ValueError):
        return 0
