"""Divide the layers of a model over the stages of a pipeline. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from kempnerforge.config.distributed import DistributedConfig
from kempnerforge.config.model import ModelConfig

STAGES_PER_RANK = {"1f1b": 1, "gpipe": 1, "interleaved_1f1b": 2}
"""Pipeline stages that one rank holds under each schedule."""


@dataclass(frozen=True)
class Stage:
    """A contiguous range of layers that one pipeline rank computes."""

    index: int
    """Stage 0 takes the tokens; the last stage computes the loss."""
    first_layer: int
    end_layer: int
    """Index after the last layer."""
    has_embedding: bool
    has_head: bool
    """Whether the stage has the final norm and the output layer."""

    @property
    def layers(self) -> range:
        """Indices of its decoder layers in the whole model."""
        return range(self.first_layer, self.end_layer)


def num_stages(distributed: DistributedConfig) -> int:
    """Return the number of stages of the whole pipeline."""
    return distributed.pp * STAGES_PER_RANK[distributed.pp_schedule]


def make_stages(model: ModelConfig, distributed: DistributedConfig) -> tuple[Stage, ...]:
    """Return all stages in order, sized by ``pp_layers``, or as evenly as ``layer_costs`` allows.

    The configuration must satisfy ``rules.pipeline_fits``.
    """
    return divide_layers(model, num_stages(distributed), distributed.pp_layers)


def divide_layers(model: ModelConfig, count: int, sizes: Sequence[int] | None = None) -> tuple[Stage, ...]:
    """Return ``count`` stages of ``sizes`` layers. None divides them as evenly as ``layer_costs`` allows."""
    sizes = sizes or split_evenly(*layer_costs(model), n_layers=model.n_layers, parts=count)
    ends = list(accumulate(sizes))
    return tuple(
        Stage(index, end - size, end, index == 0, index == count - 1)
        for index, (size, end) in enumerate(zip(sizes, ends, strict=True))
    )


def stages_of(stages: Sequence[Stage], pp_rank: int, pp: int) -> tuple[Stage, ...]:
    """Return the stages of pipeline rank ``pp_rank``: every ``pp``-th, interleaved as in Megatron."""
    return tuple(stages[pp_rank::pp])


def layer_costs(model: ModelConfig) -> tuple[float, float]:
    """Return the cost of embedding and head in decoder layers: their weights divided by a layer's.

    Weights approximate memory, to which both contribute, and the time of matrix products, to which
    the head contributes.
    """
    table = model.vocab_size * model.dim
    layer = (model.num_parameters - model.dim - table * (1 if model.tie_embeddings else 2)) / model.n_layers
    return table / layer, table / layer


def split_evenly(embedding: float, head: float, *, n_layers: int, parts: int) -> list[int]:
    """Return the layers of each of ``parts`` consecutive stages, minimizing the cost of the costliest.

    Each stage has at least one layer. A layer costs 1; ``embedding`` is added to the first stage
    and ``head`` to the last. Among splits with the same maximum, the most even one wins, then the
    one with fewer layers on the first stages, which keep the most microbatches in flight. Dynamic
    programming over (stages, layers used).
    """
    assert 1 <= parts <= n_layers
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for part in range(parts):
        extra = (embedding if part == 0 else 0.0) + (head if part == parts - 1 else 0.0)
        last, grown = part == parts - 1, {}
        for used, (worst, squares, sizes) in best.items():
            most = n_layers - used - (parts - 1 - part)
            for size in range(most if last else 1, most + 1):
                cost = size + extra
                candidate = (max(worst, cost), squares + cost**2, [*sizes, size])
                if used + size not in grown or candidate < grown[used + size]:
                    grown[used + size] = candidate
        best = grown
    return best[n_layers][2]
