"""The Llama-style decoder, as ``model.name = "llama"``."""

from __future__ import annotations

from typing import Any

from kempnerforge.config.schema import ModelConfig
from kempnerforge.model.llama import Llama


def llama(**fields: Any) -> Llama:
    """Return the model of a ``[model]`` table."""
    return Llama(ModelConfig(**fields))


PLUGIN = llama
