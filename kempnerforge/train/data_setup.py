"""Open the data that a run trains on and validates on, together on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kempnerforge.config.path_text import expand
from kempnerforge.config.schema import DataConfig, JobConfig
from kempnerforge.data.map_dataset import MapDataset, MapSamples
from kempnerforge.data.mixture import MixtureDataset
from kempnerforge.data.prepare import log_notes, prepare_cached
from kempnerforge.data.prepare_progress import plain_lines
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.record_encoder import make_encoder
from kempnerforge.data.tokenizer import load_tokenizer
from kempnerforge.data.tokens import RowOptions, Samples, TokenDataset, open_dataset
from kempnerforge.distributed.context import DistributedContext
from kempnerforge.errors import DataError
from kempnerforge.train.map_data import open_map_dataset
from kempnerforge.train.mixture_run import open_mixture
from kempnerforge.train.termination.signals import StopSignals

log = logging.getLogger(__name__)

AnyDataset = TokenDataset | MapDataset | MixtureDataset


def open_data(
    job: JobConfig,
    world: DistributedContext,
    signals: StopSignals,
    *,
    needs_val: bool | None = None,
    samples_per_step: int | None = None,
) -> AnyDataset:
    """Prepare and check the data on rank 0 while the other ranks wait, then open them on every rank.

    ``needs_val`` says whether the validation split is used. None means: if ``eval.interval`` is set.
    ``samples_per_step`` says where the phases of a mixture begin. None means the global batch size.

    Collective: all ranks. Raises DataError on all ranks, and for a dataset of the user's also
    ConfigError and PluginError.
    """
    if job.data.dataset is not None:
        return open_map_dataset(job, world.control, signals)
    needs_val = bool(job.eval.interval) if needs_val is None else needs_val
    splits = ("train", "val") if needs_val else ("train",)
    if job.data.sources:
        size = samples_per_step or job.geometry(world.num_ranks).global_batch_size

        def open_source(data: DataConfig, name: str) -> TokenDataset:
            return _open_tokens(job, data, world, signals, splits, label=f'data: source "{name}"')

        return open_mixture(job, open_source, size)
    return _open_tokens(job, job.data, world, signals, splits)


def val_splits(job: JobConfig, dataset: AnyDataset) -> dict[str, Samples | MapSamples]:
    """Return the samples of each source to validate on, by its name; "" without a mixture."""
    if isinstance(dataset, MixtureDataset):
        return {**dataset.validation(job.train.seq_len)}
    return {"": dataset.split("val", job.train.seq_len)}


def _open_tokens(
    job: JobConfig,
    data: DataConfig,
    world: DistributedContext,
    signals: StopSignals,
    splits: Sequence[str],
    *,
    label: str = "data",
) -> TokenDataset:
    """Open the text or the prepared tokens of ``data``, as ``open_data`` does, with ``splits``.

    Lines of the log begin with ``label``.
    """
    options: dict[str, Any] = {
        "vocab_size": job.model.vocabulary,
        "val_fraction": data.val_fraction,
        "rows": RowOptions.of(data),
    }

    def run_on_rank0() -> Path:
        if data.dataset_path is not None:
            path = expand(data.dataset_path, key="data.dataset_path")
        else:
            assert data.text is not None
            log.info(f"{label}: scanning {data.text}")
            path = _prepare_text(data, data.text, label)
        dataset = open_dataset(path, **options)
        if data.dataset_path is not None and dataset.index is not None:
            log_notes(dataset.index, label=label)
        log.info(f"{label}: {dataset.split('train', job.train.seq_len).describe()} in {path}")
        for name in splits[1:]:
            dataset.split(name, job.train.seq_len)
        return path

    path = world.control.run_on_rank0(lambda: signals.interruptible(run_on_rank0))
    error, dataset = None, None
    try:
        dataset = open_dataset(path, **options, verify=False)
        # A packing that this node does not see is found here, where all ranks agree on errors.
        for name in splits:
            dataset.split(name, job.train.seq_len)
    except DataError as raised:
        error = raised
    world.control.raise_on_any_error(error)
    assert dataset is not None
    return dataset


def _prepare_text(data: DataConfig, text: str | Sequence[str], label: str) -> Path:
    """Return the prepared folder of ``text``, which is read as ``data`` says."""
    return prepare_cached(
        text,
        load_tokenizer(data.tokenizer, eos=data.eos_token, bos=data.bos_token),
        data.cache_folder,
        options=ReadOptions(data.text_field, data.document_separator, data.skip_unreadable),
        make_encoder=partial(make_encoder, data),
        val_fraction=data.val_fraction,
        progress=plain_lines(lambda line: log.info(f"{label}: {line}")),
        label=label,
    )
