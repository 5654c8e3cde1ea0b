"""Check the arguments of ``CheckpointManager``, and resolve its folders, before anything is created."""

from __future__ import annotations

import os
from pathlib import Path

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.results import RunContext
from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.config.checkpoint import fill_dir, unknown_placeholder
from kempnerforge.config.path_text import expand
from kempnerforge.config.schema import CheckpointConfig


def check(config: CheckpointConfig, state: TrainState) -> None:
    """Raise TypeError or ValueError for arguments that would fail, or have no effect, later."""
    if not isinstance(config, CheckpointConfig):
        raise TypeError(f"config is a {type(config).__name__}: pass a CheckpointConfig")
    if not isinstance(state, TrainState):
        raise TypeError(f"state= is a {type(state).__name__}: pass a TrainState")
    if config.dir is not None:
        paths.local_path(config.dir)
        if unknown := unknown_placeholder(config.dir):
            raise ValueError(f"dir: {unknown} is not expanded here; only {{run_name}} and {{run_id}} are")
    components = [name for name in config.exclude_from_loading if not name.startswith("extra.")]
    if components and config.load_path is None:
        raise ValueError(
            f"exclude_from_loading: {components[0]} has no effect without load_path: a resume always loads it"
        )


def folders(config: CheckpointConfig, run_dir: str | Path, context: RunContext | None) -> tuple[Path, Path]:
    """Return the run's folder and its checkpoint folder, in which ``{run_id}`` may not be filled in yet."""
    folder = expand(config.dir, key="checkpoint.dir") if config.dir else None
    if context is None:  # a user's loop may change its working directory
        run_dir = paths.local_path(run_dir)  # check the text: a ``Path`` does not keep the ``//`` of a URL
        folder = paths.local_path(folder) if folder is not None else None
    elif folder is not None:  # without a context, the id is filled in when the record begins
        name = Path(os.path.abspath(run_dir)).name
        folder = Path(fill_dir(str(folder), run_name=name, run_id=context.run_id))
    run_dir = Path(run_dir)
    return run_dir, folder if folder is not None else run_dir / "checkpoints"
