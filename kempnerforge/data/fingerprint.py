"""Record everything that a run's data order depends on, so that a resume can report differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kempnerforge.data.map_dataset import MapDataset
from kempnerforge.data.sample_order import ORDER_NAME
from kempnerforge.data.tokens import TokenDataset

_MEANINGS = {
    "dataset": "the tokens themselves (digest)",
    "dataset_name": "data.dataset",
    "dataset_args": "data.args",
    "dataset_length": "samples of data.dataset",
    "val_fraction": "the fraction that is held out",
    "vocab_size": "the vocabulary of the tokens",
    "packing": "data.packing",
    "documents": "where documents end (digest)",
    "split": "the split that is trained on",
    "num_samples": "samples per epoch",
    "seq_len": "train.seq_len",
    "seed": "the seed of the data order",
    "order": "the shuffling algorithm",
}


def fingerprint(dataset: TokenDataset | MapDataset, split: str, seq_len: int, seed: int) -> dict[str, Any]:
    """Return everything that determines the samples at each position of the order, as JSON values.

    The code of a dataset of the user's is not part of it: its digest is one of the versions.

    Raises :class:`~kempnerforge.errors.DataError` if the split holds less than one sample.
    """
    if isinstance(dataset, MapDataset):
        return {**dataset.fingerprint(split, seq_len), "split": split, "seed": seed, "order": ORDER_NAME}
    return {
        "dataset": dataset.digest,
        "vocab_size": dataset.vocab_size,
        **dataset.rows_fingerprint(split),
        "split": split,
        "num_samples": dataset.split(split, seq_len).num_samples,
        "seq_len": seq_len,
        "seed": seed,
        "order": ORDER_NAME,
    }


def explain_difference(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for every field that differs between two fingerprints."""
    names = [*_MEANINGS, *sorted((stored.keys() | now.keys()) - _MEANINGS.keys())]
    return [
        f"{_MEANINGS.get(name, name)}: was {_shown(stored, name)}, is {_shown(now, name)}"
        for name in names
        if name in stored or name in now
        if _shown(stored, name) != _shown(now, name)
    ]


def _shown(fields: Mapping[str, Any], name: str) -> str:
    if name == "packing":  # recorded only where it is another
        return repr(fields.get(name, "contiguous"))
    return repr(fields[name]) if name in fields else "not recorded"
