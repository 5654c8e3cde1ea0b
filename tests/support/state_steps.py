"""Write and read steps of a ``TrainState`` in this process, as a save and a resume do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from support.step_maker import write_step

from kempnerforge.checkpoint.load import candidates, load_step
from kempnerforge.checkpoint.load.load_step import LoadResult
from kempnerforge.checkpoint.results import RunContext
from kempnerforge.checkpoint.state import rng_state
from kempnerforge.checkpoint.state.train_state import TrainState

CPU = torch.device("cpu")
PARTS = ("model", "optimizer", "extra", "data", "rng")


def save(folder: Path, state: TrainState, **capture: Any) -> Path:
    """Write a step as a save does, without a writer process."""
    payload = state.capture(**capture)
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in payload.tensors.items()}
    objects = json.loads(json.dumps(dict(payload.objects)))
    return write_step(folder, state.step, state=arrays, objects=objects)


def load(path: Path, state: TrainState, *, parts: tuple[str, ...] = PARTS, **options: Any) -> LoadResult:
    """Load a step as a resume does."""
    loaded = load_step.load(
        candidates.inspect(path),
        state,
        same_layout=True,
        rank=0,
        parts=parts,
        context=RunContext(),
        **options,
    )
    loaded.targets.apply()
    if "data" in parts:
        state.load_objects(loaded.reader.objects)
    if loaded.rng is not None:
        rng_state.restore(loaded.rng, CPU)
    return loaded


class Counter:
    """A user's own object with state."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def state_dict(self) -> Any:
        """Return the state."""
        return self.value

    def load_state_dict(self, value: Any) -> None:
        """Restore the state."""
        self.value = value
