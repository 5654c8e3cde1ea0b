"""How the layers of a model are shared out to the stages of a pipeline. Pure arithmetic, without torch."""

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
    """A part of the model that one pipeline rank computes."""

    index: int
    """From 0, which gets the tokens, to the last, which computes the loss."""
    first_layer: int
    end_layer: int
    """One behind its last layer."""
    has_embedding: bool
    has_head: bool
    """It has the last norm and the output layer."""

    @property
    def layers(self) -> range:
        """Numbers of its decoder layers, as in the whole model."""
        return range(self.first_layer, self.end_layer)


def num_stages(distributed: DistributedConfig) -> int:
    """Stages of the whole pipeline."""
    return distributed.pp * STAGES_PER_RANK[distributed.pp_schedule]


def make_stages(model: ModelConfig, distributed: DistributedConfig) -> tuple[Stage, ...]:
    """All stages, in order: ``pp_layers`` each, or as even as they can be by ``layer_costs``.

    The configuration must be one that ``rules.pipeline_fits`` lets through.
    """
    count = num_stages(distributed)
    sizes = distributed.pp_layers or split_evenly(*layer_costs(model), n_layers=model.n_layers, parts=count)
    ends = list(accumulate(sizes))
    return tuple(
        Stage(index, end - size, end, index == 0, index == count - 1)
        for index, (size, end) in enumerate(zip(sizes, ends, strict=True))
    )


def stages_of(stages: Sequence[Stage], pp_rank: int, pp: int) -> tuple[Stage, ...]:
    """The stages that pipeline rank ``pp_rank`` of ``pp`` holds: every ``pp``-th, as Megatron interleaves."""
    return tuple(stages[pp_rank::pp])


def layer_costs(model: ModelConfig) -> tuple[float, float]:
    """What embedding and head cost, in decoder layers: their weights over a layer's.

    Weights stand for memory, where both count, and for the time of matrix products, where the head does.
    """
    table = model.vocab_size * model.dim
    layer = (model.num_parameters - model.dim - table * (1 if model.tie_embeddings else 2)) / model.n_layers
    return table / layer, table / layer


def split_evenly(embedding: float, head: float, *, n_layers: int, parts: int) -> list[int]:
    """Layers of each of ``parts`` consecutive stages, at least one each, so that the costliest is cheapest.

    A layer costs 1, ``embedding`` comes on top of the first stage and ``head`` on top of the last. Among
    splits with the same maximum the most even one wins, then the one with less on the first stages, which
    keep the most microbatches in flight. Dynamic programming over (stages, layers used).
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
                found = (max(worst, cost), squares + cost**2, [*sizes, size])
                if used + size not in grown or found < grown[used + size]:
                    grown[used + size] = found
        best = grown
    return best[n_layers][2]
