"""What a run does with several sources of data: open them, say what is drawn, and end with one of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

from kempnerforge.config.schema import DataConfig, JobConfig
from kempnerforge.data.loader import AnySamples
from kempnerforge.data.mixture import MixtureDataset, MixtureSamples, describe_weights
from kempnerforge.data.tokens import TokenDataset
from kempnerforge.distributed.consensus import mark_collective
from kempnerforge.errors import ConfigError, DataError

log = logging.getLogger(__name__)


def open_mixture(
    job: JobConfig, open_source: Callable[[DataConfig, str], TokenDataset], global_batch_size: int
) -> MixtureDataset:
    """Open all sources of ``job``, one after the other, with ``open_source``, which is collective.

    It gets the data and the name of each source.

    Raises DataError on all ranks, with the key and the name of the source.
    """
    sources: dict[str, TokenDataset] = {}
    for source, (key, data) in zip(job.data.sources, job.data.parts().items(), strict=True):
        try:
            sources[source.name] = open_source(data, source.name)
        except DataError as error:
            raise _named(error, f'{key} "{source.name}"') from error
        if sources[source.name].index is None:
            log.info(f'data: "{source.name}" does not record its tokenizer, so it is not compared')
    try:
        return MixtureDataset(
            sources,
            job.data.weights(),
            stops=[source.name for source in job.data.sources if source.when_used_up == "stop"],
            seed=job.train.seed,
            global_batch_size=global_batch_size,
        )
    except DataError as error:
        raise mark_collective(error) from None


def _named(error: DataError, what: str) -> DataError:
    named = DataError(f"{what}: {error}")
    named.agreed = error.agreed
    return named


def describe_mixture(samples: AnySamples) -> list[str]:
    """Return a line with the weights of all phases, and the sources of which no sample is drawn."""
    if not isinstance(samples, MixtureSamples):
        return []
    order = samples.order
    lines = [
        describe_weights(dict(zip(order.names, phase.weights, strict=True)))
        + (f" from step {phase.start_step} on" if phase.start_step else "")
        for phase in order.phases
    ]
    unused = [
        f'"{name}"'
        for i, name in enumerate(order.names)
        if not any(phase.weights[i] for phase in order.phases)
    ]
    only = [f"only for validation: {', '.join(unused)}"] if unused else []
    return [f"mixture: {'; '.join([*lines, *only])}"]


def end_with_data(
    job: JobConfig, samples: AnySamples, global_batch_size: int, *, step: int = 0, cursor: int = 0
) -> tuple[JobConfig, str]:
    """Return ``job`` with the ``train.max_steps`` that its data are enough for, and what is used up then.

    ``step`` and ``cursor`` say where the training begins. The name is that of the source, or empty if
    the data are enough for the steps of ``job``. The result is the same on all ranks.

    Raises DataError if nothing can be trained, and ConfigError if the schedule does not fit the steps.
    """
    end = samples.end if isinstance(samples, MixtureSamples) else None
    if end is None:
        return job, ""
    last = step + max(0, end.position - cursor) // global_batch_size
    if last >= job.train.max_steps:
        return job, ""
    where = f'source "{end.name}" is used up after step {last} (when_used_up = "stop")'
    if last == 0:
        raise mark_collective(
            DataError(f"{where}, so that nothing can be trained: lower its weight, or repeat it")
        )
    try:
        return job.with_max_steps(last), end.name
    except ConfigError as error:
        raise ConfigError(error.faults, where=where) from None


def epochs_at(samples: AnySamples, cursor: int) -> dict[str, float]:
    """Return how many epochs of each source are drawn before ``cursor``; nothing without a mixture."""
    return samples.order.epochs(cursor) if isinstance(samples, MixtureSamples) else {}


def samples_per_epoch(samples: AnySamples) -> int | None:
    """Return the number of samples, by which ``train/tokens`` tells the epochs.

    None where it does not: sources of a mixture have epochs of their own, and targets that do not
    count are not in ``train/tokens``.
    """
    if isinstance(samples, MixtureSamples) or not samples.counts_all:
        return None
    return samples.num_samples


def step_rows(samples: AnySamples, cursor: int, losses: Sequence[float] | None) -> dict[str, float]:
    """Return ``data/epoch/NAME`` of each source drawn from, and ``train/loss/NAME`` of those in the batch.

    ``losses`` has NaN for a source that is not in the batch; None if the model does not tell them.
    """
    if not isinstance(samples, MixtureSamples):
        return {}
    rows = {f"data/epoch/{name}": epochs for name, epochs in epochs_at(samples, cursor).items() if epochs}
    if losses is not None:
        found = dict(zip(samples.order.names, losses, strict=True))
        rows |= source_rows(
            "train/loss", {name: loss for name, loss in found.items() if not math.isnan(loss)}
        )
    return rows


def weighted_loss(losses: Mapping[str, float], samples: AnySamples, cursor: int) -> float:
    """Return the mean of the validation losses of the sources, by the weights of the batch at ``cursor``."""
    if not isinstance(samples, MixtureSamples):
        return losses[""]
    weights = samples.order.weights_at(cursor)
    total = sum(weights.values())
    return sum(losses[name] * part for name, part in weights.items() if part) / total


def source_rows(prefix: str, losses: Mapping[str, float]) -> dict[str, float]:
    """Return ``PREFIX/NAME`` of each source; nothing without a mixture."""
    return {f"{prefix}/{name}": loss for name, loss in losses.items() if name}
