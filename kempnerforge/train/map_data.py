"""Open a dataset of the user's on every rank, after rank 0 has checked it."""

from __future__ import annotations

import logging

import numpy as np
import torch

from kempnerforge.config.schema import JobConfig
from kempnerforge.data.map_dataset import TRAIN_KEY, VAL_KEY, MapDataset, MapSamples, UserDataset
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.errors import DataError, KempnerForgeError, PluginError
from kempnerforge.train.termination.signals import StopSignals

log = logging.getLogger(__name__)


def open_map_dataset(job: JobConfig, control: ControlGroup, signals: StopSignals) -> MapDataset:
    """Build ``data.dataset``, and ``data.val.dataset`` if the run validates, first on rank 0.

    Rank 0 reads the first sample of each. Collective: all ranks of ``control``.
    Raises ConfigError, DataError and PluginError on all ranks.
    """
    own: list[MapDataset] = []

    def on_rank0() -> tuple[bool, list[int]]:
        train, val = _user_datasets(job)
        _require_samples(train, val)
        has_tokens = train.has_tokens()
        dataset = _map_dataset(job, train, val, has_tokens=has_tokens)
        _read_first(job, dataset)
        own.append(dataset)
        unit = f"samples of {job.train.seq_len} tokens" if has_tokens else "samples"
        held_out = train.num_samples - dataset.split("train", job.train.seq_len).num_samples
        log.info(f'data: {train.num_samples:,} {unit} in "{train.name}", {held_out:,} of them held out')
        return has_tokens, _sizes(dataset)

    has_tokens, sizes = control.run_on_rank0(lambda: signals.interruptible(on_rank0))
    error = None
    if not own:
        try:
            own.append(_map_dataset(job, *_user_datasets(job), has_tokens=has_tokens))
            if (found := _sizes(own[0])) != sizes:
                problem = f"rank {control.rank} counts {found} samples, rank 0 {sizes}"
                error = DataError(f'{TRAIN_KEY} "{job.data.dataset}": {problem}')
        except KempnerForgeError as raised:
            error = raised
    control.raise_on_any_error(error)
    return own[0]


def _user_datasets(job: JobConfig) -> tuple[UserDataset, UserDataset | None]:
    data = job.data
    assert data.dataset is not None
    train = UserDataset(data.dataset, data.args, key=TRAIN_KEY)
    if data.val is None or not job.eval.interval:
        return train, None
    return train, UserDataset(data.val.dataset, data.val.args, key=VAL_KEY)


def _map_dataset(
    job: JobConfig, train: UserDataset, val: UserDataset | None, *, has_tokens: bool
) -> MapDataset:
    return MapDataset(
        train,
        val,
        own_val=job.data.val is not None,
        val_fraction=job.data.val_fraction,
        vocab_size=job.model.vocabulary,
        has_tokens=has_tokens,
    )


def _require_samples(*datasets: UserDataset | None) -> None:
    for dataset in datasets:
        if dataset is not None and dataset.num_samples == 0:
            raise DataError(f"{dataset.name} has no samples: its __len__ returns 0")


def _read_first(job: JobConfig, dataset: MapDataset) -> None:
    """Read the first samples twice. A wrong shape is a DataError before anything is trained."""
    for split in ("train", "val") if job.eval.interval else ("train",):
        samples, first = dataset.split(split, job.train.seq_len), np.array([0])
        try:
            reads = [_as_bytes(samples, first) for _ in range(2)]
        except PluginError as error:
            if error.__cause__ is not None:  # raised by the user's code
                raise
            raise DataError(str(error)) from None
        if reads[0] != reads[1]:
            log.warning(
                f'"{samples.dataset.name}": two reads of sample {samples.indices(first)[0]} differ, so a '
                "resumed run will not be bitwise equal. Derive random numbers from the index"
            )


def _as_bytes(samples: MapSamples, ids: np.ndarray) -> list[bytes]:
    """Return the values of samples ``ids`` as bytes, so that NaN equals NaN."""
    if samples.has_tokens:
        return [samples.read(ids).tokens.tobytes()]
    return [value.view(torch.uint8).numpy().tobytes() for value in samples.read_fields(ids).values()]


def _sizes(dataset: MapDataset) -> list[int]:
    return [user.num_samples for user in (dataset.train, dataset.val) if user is not None]
