"""Compare the model of a checkpoint with the model of a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from kempnerforge.config.model import ModelConfig


@dataclass(frozen=True)
class ModelChanges:
    """Differences in ``[model]`` that change what the model computes."""

    lines: tuple[str, ...] = ()
    """``model.dim was 128, is 256``, a line for each key; empty for the same model."""
    same_shapes: bool = True
    """Whether the weights of both models have the same shapes."""


def model_changes(stored: Mapping[str, Any], now: Mapping[str, Any]) -> ModelChanges:
    """Compare two ``[model]`` tables after filling in defaults.

    ``max_seq_len`` and ``init_std`` are ignored: neither changes what trained weights compute. A
    table that this version cannot read is not compared. Which arguments of a user's model change
    the shapes of its weights is not known here: a load compares those.
    """
    before, after = _parse(stored), _parse(now)
    if before is None or after is None:
        return ModelChanges()
    if before.name != after.name:
        return ModelChanges((f"model.name was {before.name}, is {after.name}",), same_shapes=False)
    was, is_now = _meaning(before), _meaning(after)
    lines = [
        f"model.{key} was {_shown(was.get(key))}, is {_shown(is_now.get(key))}"
        for key in {**was, **is_now}
        if was.get(key) != is_now.get(key)
    ]
    return ModelChanges(tuple(lines), not before.is_llama or _shapes(before) == _shapes(after))


def _parse(table: Mapping[str, Any]) -> ModelConfig | None:
    try:
        return ModelConfig.model_validate(
            {key: value for key, value in table.items() if key in ModelConfig.model_fields}
        )
    except ValidationError:
        return None


def _meaning(model: ModelConfig) -> dict[str, Any]:
    if not model.is_llama:
        return {**{f"args.{key}": value for key, value in model.args.items()}, "freeze": model.freeze}
    resolved = {
        "n_kv_heads": model.kv_heads,
        "head_dim": model.resolved_head_dim,
        "ffn_hidden_dim": model.ffn_dim,
    }
    values = {**model.model_dump(mode="json"), **resolved}
    return {key: value for key, value in values.items() if key not in ("max_seq_len", "init_std")}


def _shapes(model: ModelConfig) -> tuple[Any, ...]:
    return model.n_layers, model.vocab_size, model.dim, model.tie_embeddings, model.layer_shapes


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {item}" for key, item in value.items()) + "}"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
