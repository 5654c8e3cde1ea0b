"""Every parameter of a model, how tensor parallelism and FSDP cut it, and how much of it each rank holds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from kempnerforge.config.model import ModelConfig
from kempnerforge.config.parallel_dims import ParallelDims
from kempnerforge.config.pipeline_stages import Stage


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model."""

    name: str
    """As in a checkpoint."""
    shape: tuple[int, ...]
    tp_dim: int | None
    """The dimension that tensor parallelism cuts; None for the norms, of which every tp rank has a copy."""

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)


def layer_parameters(model: ModelConfig, number: int) -> list[Parameter]:
    """The parameters of decoder layer ``number``, cut by heads and by feed-forward width."""
    return [
        Parameter(f"layers.{number}.{name}", shape, _tp_dim(name, shape))
        for name, shape in model.layer_shapes.items()
    ]


def _tp_dim(name: str, shape: tuple[int, ...]) -> int | None:
    """Megatron's cuts: matrices that write to the residual stream by column, all others by row."""
    if len(shape) < 2:
        return None
    return 1 if name in ("attention.wo.weight", "feed_forward.w2.weight") else 0


def outer_parameters(model: ModelConfig, stage: Stage) -> list[Parameter]:
    """What a stage holds beside its layers: embedding, last norm, output layer. Tables are cut by row."""
    table = (model.vocab_size, model.dim)
    found = []
    if stage.has_embedding:
        found.append(Parameter("tok_embeddings.weight", table, 0))
    if stage.has_head:
        found.append(Parameter("norm.weight", (model.dim,), None))
        if not model.tie_embeddings:
            found.append(Parameter("output.weight", table, 0))
    return found


def stage_parameters(model: ModelConfig, stage: Stage) -> list[Parameter]:
    """All parameters of a stage."""
    layers = [parameter for number in stage.layers for parameter in layer_parameters(model, number)]
    return [*outer_parameters(model, stage), *layers]


def chunk_lengths(length: int, parts: int) -> list[int]:
    """How ``torch.chunk`` shares ``length`` rows out to ``parts`` ranks: the last may have fewer or none."""
    chunk = -(-length // parts)
    return [max(0, min(chunk, length - part * chunk)) for part in range(parts)]


def local_shape(
    parameter: Parameter, geometry: ParallelDims, *, tp_rank: int = 0, shard_rank: int = 0
) -> tuple[int, ...]:
    """What one rank holds: first cut by tp in its dimension, then by FSDP in dimension 0.

    Rank 0 of both, the default, never holds less than any other.
    """
    shape = list(tp_shape(parameter, geometry.tp, tp_rank))
    shape[0] = chunk_lengths(shape[0], geometry.dp_shard)[shard_rank]
    return tuple(shape)


def tp_shape(parameter: Parameter, tp: int, tp_rank: int = 0) -> tuple[int, ...]:
    """What a tp rank has of a parameter once FSDP has gathered it."""
    shape = list(parameter.shape)
    if parameter.tp_dim is not None:
        shape[parameter.tp_dim] = chunk_lengths(shape[parameter.tp_dim], tp)[tp_rank]
    return tuple(shape)


def local_numel(
    parameters: Iterable[Parameter], geometry: ParallelDims, *, tp_rank: int = 0, shard_rank: int = 0
) -> int:
    """Elements of ``parameters`` that one rank holds."""
    shapes = (local_shape(one, geometry, tp_rank=tp_rank, shard_rank=shard_rank) for one in parameters)
    return sum(map(math.prod, shapes))


def gathered_numel(parameters: Iterable[Parameter], tp: int) -> int:
    """Elements of ``parameters`` on a rank while FSDP has them gathered; the most that any tp rank has."""
    return sum(math.prod(tp_shape(one, tp)) for one in parameters)
