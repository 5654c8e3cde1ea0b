"""The parameters of a model, and the shards of them on each rank under tensor parallelism and FSDP."""

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
    """Name in a checkpoint."""
    shape: tuple[int, ...]
    tp_dim: int | None
    """The dimension that tensor parallelism shards; None for the norms, which every tp rank replicates."""
    is_hidden: bool = False
    """Whether it is a hidden matrix, see ``train.optimizer.hidden_matrices``."""
    frozen: bool = False
    """Whether it is not trained: it has no gradient and no optimizer state."""

    @property
    def numel(self) -> int:
        """Number of elements of the whole parameter."""
        return math.prod(self.shape)


def layer_parameters(model: ModelConfig, number: int) -> list[Parameter]:
    """Return the parameters of decoder layer ``number``, sharded by heads and by feed-forward width."""
    return [
        _parameter(model, f"layers.{number}.{name}", shape, _tp_dim(name, shape), is_hidden=len(shape) > 1)
        for name, shape in model.layer_shapes.items()
    ]


def _parameter(
    model: ModelConfig, name: str, shape: tuple[int, ...], tp_dim: int | None, *, is_hidden: bool = False
) -> Parameter:
    return Parameter(name, shape, tp_dim, is_hidden, frozen=model.freezes(name))


def trained(parameters: Iterable[Parameter]) -> list[Parameter]:
    """Return the parameters that are not frozen."""
    return [parameter for parameter in parameters if not parameter.frozen]


def _tp_dim(name: str, shape: tuple[int, ...]) -> int | None:
    """Shard as Megatron does: matrices that write to the residual stream by column, all others by row."""
    if len(shape) < 2:
        return None
    return 1 if name in ("attention.wo.weight", "feed_forward.w2.weight") else 0


def outer_parameters(model: ModelConfig, stage: Stage) -> list[Parameter]:
    """Return the parameters of a stage outside its layers: embedding, final norm, output layer.

    Embedding and output layer are sharded by row.
    """
    table = (model.vocab_size, model.dim)
    parameters = []
    if stage.has_embedding:
        parameters.append(_parameter(model, "tok_embeddings.weight", table, 0))
    if stage.has_head:
        parameters.append(_parameter(model, "norm.weight", (model.dim,), None))
        if not model.tie_embeddings:
            parameters.append(_parameter(model, "output.weight", table, 0))
    return parameters


def stage_parameters(model: ModelConfig, stage: Stage) -> list[Parameter]:
    """Return all parameters of a stage."""
    layers = [parameter for number in stage.layers for parameter in layer_parameters(model, number)]
    return [*outer_parameters(model, stage), *layers]


def chunk_lengths(length: int, parts: int) -> list[int]:
    """Return how ``torch.chunk`` divides ``length`` rows. The last ``parts`` may have fewer rows or none."""
    chunk = -(-length // parts)
    return [max(0, min(chunk, length - part * chunk)) for part in range(parts)]


def local_shape(
    parameter: Parameter, geometry: ParallelDims, *, tp_rank: int = 0, shard_rank: int = 0
) -> tuple[int, ...]:
    """Return the shape of a rank's shard: sharded by tp in its dimension, then by FSDP in dimension 0.

    Rank 0 of both, the default, has at least as much as any other rank.
    """
    shape = list(tp_shape(parameter, geometry.tp, tp_rank))
    shape[0] = chunk_lengths(shape[0], geometry.dp_shard)[shard_rank]
    return tuple(shape)


def tp_shape(parameter: Parameter, tp: int, tp_rank: int = 0) -> tuple[int, ...]:
    """Return the shape of a tp rank's shard after FSDP has gathered it."""
    shape = list(parameter.shape)
    if parameter.tp_dim is not None:
        shape[parameter.tp_dim] = chunk_lengths(shape[parameter.tp_dim], tp)[tp_rank]
    return tuple(shape)


def local_numel(
    parameters: Iterable[Parameter], geometry: ParallelDims, *, tp_rank: int = 0, shard_rank: int = 0
) -> int:
    """Return the number of elements of ``parameters`` on one rank."""
    shapes = (
        local_shape(parameter, geometry, tp_rank=tp_rank, shard_rank=shard_rank) for parameter in parameters
    )
    return sum(map(math.prod, shapes))


def gathered_numel(parameters: Iterable[Parameter], tp: int) -> int:
    """Return the number of gathered elements of ``parameters`` on the tp rank with the most."""
    return sum(math.prod(tp_shape(parameter, tp)) for parameter in parameters)
