"""Resolve the paths on the command line of ``kempnerforge ckpt``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kempnerforge.checkpoint.format import latest_link, paths
from kempnerforge.checkpoint.format.step_info import StepView
from kempnerforge.checkpoint.retention.policy import KeepPolicy
from kempnerforge.checkpoint.run import claim, metadata
from kempnerforge.checkpoint.run.owner import ANYONE, Owner
from kempnerforge.checkpoint.run.owner import of_folder as owner_of
from kempnerforge.errors import CheckpointError, RunFolderError, StepNotFoundError

if TYPE_CHECKING:
    from kempnerforge.config.checkpoint import CheckpointConfig

RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run's folder, or the folder of its checkpoints.")
]
StepPath = Annotated[
    Path, typer.Argument(metavar="STEP_DIR", help="A step's folder, or the link RUN/checkpoints/latest.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoint folder of a run."""

    folder: Path
    run_dir: Path | None
    """The run's own folder; None if only the folder of its checkpoints was given."""
    owner: Owner = ANYONE
    """The run that owns the folder, if known."""

    def step(self, step: int) -> Path:
        """Return the path of a committed step."""
        return self.folder / paths.step_name(step)


def find_run(path: Path) -> CheckpointFolder:
    """Return the checkpoint folder of RUN. Raises RunFolderError, also if another run owns it."""
    try:
        if not path.is_dir():
            raise RunFolderError(f"{path} {'is not a folder' if path.exists() else 'does not exist'}")
        record = metadata.read(path)
        if record is not None:
            folder = record.checkpoint_folder(path)
            return CheckpointFolder(folder, path, claim.require_own(folder, record, path))
        if (path / "checkpoints").is_dir():
            return CheckpointFolder(path / "checkpoints", path, owner_of(path / "checkpoints"))
        if _is_step(path):
            raise RunFolderError(f"{path} is a single step; give the run's folder, or {path.parent}")
        owner = owner_of(path)
        if (run_dir := _run_of(path.absolute(), owner)) is not None:
            return CheckpointFolder(path, run_dir, owner_of(path, run_dir))
        if owner.run_id or paths.list_folder(path) != paths.FolderListing():
            return CheckpointFolder(path, None, owner)
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error}") from error
    raise RunFolderError(
        f"{path} has no checkpoints; give a run's folder, such as runs/NAME, or the folder its steps are in"
    )


def _run_of(folder: Path, owner: Owner) -> Path | None:
    """Return the run folder of the checkpoints in ``folder``: its parent, or the one its owner file names."""
    for run_dir in (folder.parent, *([Path(owner.run_dir)] if owner.run_dir else [])):
        record = metadata.read(run_dir)
        if record is not None and record.checkpoint_folder(run_dir) == folder:
            return run_dir if owner.run_id in ("", record.run_id) else None
    return None


def find_step(path: Path) -> Path:
    """Return the folder of STEP_DIR with links resolved; ``latest`` is the newest step even without a link.

    Raises StepNotFoundError, RunFolderError.
    """
    try:
        real = latest_link.resolve(path).resolve(strict=True)
        if real.is_dir() and _is_step(real):
            return real
        if not real.is_dir():
            raise StepNotFoundError(f"{path} is a file; give the step's folder")
    except FileNotFoundError:
        raise StepNotFoundError(f"{path} does not exist{_known_steps(path.parent)}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: links form a cycle
        raise RunFolderError(f"{path} cannot be read: {error}") from error
    hint = _known_steps(path) or _known_steps(path / "checkpoints")
    raise StepNotFoundError(f"{path} is not the folder of one step: it has no {paths.MANIFEST}{hint}")


def find_steps(path: Path) -> tuple[list[Path], CheckpointFolder | None]:
    """Return the step of STEP_DIR, or the committed steps of RUN, newest first, and the run."""
    if path.name == paths.LATEST or (path.is_dir() and _is_step(path.resolve())):
        return [find_step(path)], None
    run = find_run(path)
    steps = paths.list_folder(run.folder).steps
    if not steps:
        raise StepNotFoundError(f"{run.folder} has no committed step")
    return [run.step(step) for step in steps], run


def parse_step(text: str) -> int:
    """Return the step in ``1000`` or ``step_00001000``. Raises StepNotFoundError."""
    is_number = text.isascii() and text.isdecimal() and len(text) < 19
    step = int(text) if is_number else paths.step_number(text)
    if step is None:
        raise StepNotFoundError(f"{text!r} is not a step; write its number, such as 1000")
    return step


@dataclass(frozen=True)
class FoundPolicy:
    """The retention policy of a run, read from its checkpoints."""

    policy: KeepPolicy
    source: str
    """The step whose config has the policy; empty if there is none."""
    problem: str = ""
    """Why no policy was found."""
    config: CheckpointConfig | None = None
    """The ``[checkpoint]`` section of that config."""


def find_policy(run: CheckpointFolder, steps: Sequence[int]) -> FoundPolicy:
    """Return the policy in the config of the newest intact step of ``steps`` that the run owns.

    Return an empty policy if there is no such step.
    """
    for step in steps:
        try:
            view = StepView.open(run.step(step), step=step)
            if not run.owner.owns(view.manifest.provenance):
                continue
            config = view.config()
        except (CheckpointError, OSError):
            continue
        if "checkpoint" not in config:
            return FoundPolicy(KeepPolicy(), "", f"the config of step {step} has no [checkpoint]")
        return _policy_of(config["checkpoint"], paths.step_name(step))
    return FoundPolicy(KeepPolicy(), "", "no step is intact")


def _policy_of(table: object, source: str) -> FoundPolicy:
    # Imported here: pydantic takes longer to import than most commands take to run.
    from pydantic import ValidationError

    from kempnerforge.config.checkpoint import CheckpointConfig

    try:
        config = CheckpointConfig.model_validate(table)
        return FoundPolicy(KeepPolicy.from_config(config), source, config=config)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, ('checkpoint', *first['loc'])))}: {first['msg']}"
        return FoundPolicy(KeepPolicy(), "", f"this version cannot read the config in {source} ({what})")


def _is_step(path: Path) -> bool:
    named = paths.step_number(path.name) is not None or paths.is_set_aside(path.name)
    return named or (path / paths.MANIFEST).is_file()


def _known_steps(folder: Path) -> str:
    try:
        steps = paths.committed_steps(folder)
    except OSError:
        return ""
    return f"; steps in {folder}: {', '.join(map(str, steps))}" if steps else ""
