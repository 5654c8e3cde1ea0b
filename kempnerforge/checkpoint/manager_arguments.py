"""What a ``CheckpointManager`` is given: checked before anything is made, and resolved to folders."""

from __future__ import annotations

import os
from pathlib import Path

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.results import RunContext
from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.config.checkpoint import fill_dir, unknown_placeholder
from kempnerforge.config.schema import CheckpointConfig


def check(config: CheckpointConfig, state: TrainState) -> None:
    """Raise TypeError and ValueError for what would fail, or have no effect, later."""
    if not isinstance(config, CheckpointConfig):
        raise TypeError(f"config is a {type(config).__name__}: give a CheckpointConfig")
    if not isinstance(state, TrainState):
        raise TypeError(f"state= is a {type(state).__name__}: give a TrainState")
    if config.dir is not None:
        paths.local_path(config.dir)
        if unknown := unknown_placeholder(config.dir):
            raise ValueError(f"dir: {unknown} is not expanded here; {{run_name}} and {{run_id}} are")
    parts = [name for name in config.exclude_from_loading if not name.startswith("extra.")]
    if parts and config.load_path is None:
        raise ValueError(
            f"exclude_from_loading: {parts[0]} has no effect without load_path: a resume always loads it"
        )


def folders(config: CheckpointConfig, run_dir: Path, context: RunContext | None) -> tuple[Path, Path]:
    """Return the folder of the run and that of its checkpoints; ``{run_id}`` stays until the id is known."""
    folder = Path(config.dir).expanduser() if config.dir else None
    if context is None:  # a loop of a user's own may change its working folder
        run_dir = paths.local_path(run_dir)
        folder = paths.local_path(folder) if folder is not None else None
    else:
        run_dir = Path(run_dir)
        if folder is not None:  # without a context, the id is known when the record begins
            name = Path(os.path.abspath(run_dir)).name
            folder = Path(fill_dir(str(folder), run_name=name, run_id=context.run_id))
    return run_dir, folder if folder is not None else run_dir / "checkpoints"
