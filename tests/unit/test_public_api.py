"""The public API: the names of ``kempnerforge.__all__``, imported when they are asked for."""

from __future__ import annotations

import importlib

import pytest

import kempnerforge

NAMES = {
    "AsyncCheckpointMode": "kempnerforge.config.schema",
    "AsyncCheckpointer": "kempnerforge.checkpoint.async_save",
    "CheckpointConfig": "kempnerforge.config.schema",
    "CheckpointManager": "kempnerforge.checkpoint.manager",
    "Hook": None,
    "SafetensorsReader": None,
    "SafetensorsWriter": None,
    "Sink": None,
    "TrainState": None,
    "load_job": "kempnerforge.config.schema",
}
"""Name -> the module that has it for good, too; None: it may move."""


def test_public_api_is_these_names() -> None:
    assert sorted(kempnerforge.__all__) == sorted(NAMES)
    assert set(NAMES) <= set(dir(kempnerforge))


@pytest.mark.parametrize("name", NAMES)
def test_public_name_is_found(name: str) -> None:
    found = getattr(kempnerforge, name)
    assert found.__name__ == name
    home = NAMES[name]
    assert home is None or getattr(importlib.import_module(home), name) is found


def test_public_api_unknown_name_is_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'kempnerforge' has no attribute 'nothing'"):
        _ = kempnerforge.nothing  # type: ignore[attr-defined]
