"""What a run's data order depends on, in a form that explains itself when it differs at a resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kempnerforge.data.sample_order import ORDER_NAME
from kempnerforge.data.tokens import TokenDataset

_MEANINGS = {
    "dataset": "the tokens themselves (digest)",
    "vocab_size": "the vocabulary of the tokens",
    "split": "the split that is trained on",
    "num_samples": "samples an epoch",
    "seq_len": "train.seq_len",
    "seed": "the seed of the data order",
    "order": "how this version shuffles",
}


def fingerprint(dataset: TokenDataset, split: str, seq_len: int, seed: int) -> dict[str, Any]:
    """Everything that decides which tokens stand at which place of the order; JSON values only.

    Raises :class:`~kempnerforge.errors.DataError` if the split holds less than one sample.
    """
    return {
        "dataset": dataset.digest,
        "vocab_size": dataset.vocab_size,
        "split": split,
        "num_samples": dataset.split(split, seq_len).num_samples,
        "seq_len": seq_len,
        "seed": seed,
        "order": ORDER_NAME,
    }


def explain_difference(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for every field that differs between two fingerprints; empty if the data are the same."""
    names = [*_MEANINGS, *sorted((stored.keys() | now.keys()) - _MEANINGS.keys())]
    return [
        f"{_MEANINGS.get(name, name)}: was {_shown(stored, name)}, is {_shown(now, name)}"
        for name in names
        if name in stored or name in now
        if _shown(stored, name) != _shown(now, name)
    ]


def _shown(fields: Mapping[str, Any], name: str) -> str:
    return repr(fields[name]) if name in fields else "not recorded"
