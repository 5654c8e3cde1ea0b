"""KempnerForge: training runs that are described by one TOML file and survive a kill at any instant.

The names in ``__all__`` are the public API. Each is imported at its first use, so that
``import kempnerforge`` is fast and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kempnerforge.checkpoint.async_save import AsyncCheckpointer
    from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader
    from kempnerforge.checkpoint.manager import CheckpointManager
    from kempnerforge.checkpoint.save.dcp_writer import SafetensorsWriter
    from kempnerforge.checkpoint.state.train_state import TrainState
    from kempnerforge.config.schema import AsyncCheckpointMode, CheckpointConfig, load_job
    from kempnerforge.telemetry.sinks import Sink
    from kempnerforge.train.hooks import Hook

__version__ = "0.1.0"

__all__ = [
    "AsyncCheckpointMode",
    "AsyncCheckpointer",
    "CheckpointConfig",
    "CheckpointManager",
    "Hook",
    "SafetensorsReader",
    "SafetensorsWriter",
    "Sink",
    "TrainState",
    "load_job",
]

_MODULES = {
    "AsyncCheckpointMode": "config.schema",
    "AsyncCheckpointer": "checkpoint.async_save",
    "CheckpointConfig": "config.schema",
    "CheckpointManager": "checkpoint.manager",
    "Hook": "train.hooks",
    "SafetensorsReader": "checkpoint.load.dcp_reader",
    "SafetensorsWriter": "checkpoint.save.dcp_writer",
    "Sink": "telemetry.sinks",
    "TrainState": "checkpoint.state.train_state",
    "load_job": "config.schema",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
