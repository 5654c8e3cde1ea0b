"""Record everything that a run's data order depends on, so that a resume can report differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kempnerforge.data.map_dataset import MapDataset
from kempnerforge.data.mixture import MixtureDataset, describe_weights
from kempnerforge.data.mixture_schedule import SCHEDULE_NAME
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
    "mixture": "the mixing algorithm",
}
_OF_SOURCES = ("sources", "phases")
"""Fields of a mixture, which may change from the position of a resume on."""
_LATER = "other weights may begin at the step of the resume, or later: [[data.phases]]"


def fingerprint(
    dataset: TokenDataset | MapDataset | MixtureDataset, split: str, seq_len: int, seed: int
) -> dict[str, Any]:
    """Return everything that determines the samples at each position of the order, as JSON values.

    The code of a dataset of the user's is not part of it: its digest is one of the versions.

    Raises :class:`~kempnerforge.errors.DataError` if the split holds less than one sample.
    """
    if isinstance(dataset, MixtureDataset):
        return _of_mixture(dataset, split, seq_len, seed)
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


def _of_mixture(dataset: MixtureDataset, split: str, seq_len: int, seed: int) -> dict[str, Any]:
    parts = {name: fingerprint(source, split, seq_len, seed) for name, source in dataset.sources.items()}
    common = {"split": split, "seq_len": seq_len, "seed": seed, "order": ORDER_NAME}
    return {
        "sources": {
            name: {key: value for key, value in part.items() if key not in common}
            for name, part in parts.items()
        },
        "phases": [
            {
                "start_step": phase.start_step,
                "start": phase.start,
                "weights": {
                    name: weight for name, weight in zip(parts, phase.weights, strict=True) if weight
                },
            }
            for phase in dataset.phases
        ],
        "mixture": SCHEDULE_NAME,
        **common,
    }


def compare_data(
    stored: Mapping[str, Any], now: Mapping[str, Any], samples: int = 0
) -> tuple[list[str], list[str]]:
    """Compare two fingerprints at a cursor of ``samples``.

    Return a line for each difference that changes samples before the cursor, and one for each that
    changes only what follows it: sources and phases that a mixture gets there.
    """
    if ("sources" in stored) != ("sources" in now):
        kinds = [
            "a mixture (data.sources)" if "sources" in fields else "one dataset" for fields in (stored, now)
        ]
        return [f"the data: was {kinds[0]}, is {kinds[1]}"], []
    changes = explain_difference(stored, now)
    if "sources" not in now:
        return changes, []
    before, after = _phases(stored, samples), _phases(now, samples)
    used = [name for name in stored["sources"] if any(name in phase["weights"] for phase in before[0])]
    for name in used:
        lines = explain_difference(stored["sources"][name], now["sources"].get(name, {}))
        changes += [f'source "{name}": {line}' for line in lines] if name in now["sources"] else []
    if _weights(before[0]) != _weights(after[0]):
        changes.append(
            f"the weights: were {_shown_phases(before[0])}; are {_shown_phases(after[0])} "
            f"({_other_size(stored, now) or _LATER})"
        )
    return changes, _additions(stored, now, used, before[1], after[1])


def _phases(fields: Mapping[str, Any], samples: int) -> tuple[list[Any], list[Any]]:
    """Return the phases that begin before a cursor, and those that begin there or later."""
    phases = fields["phases"]
    past = [phase for phase in phases if phase["start"] < samples]
    return past, phases[len(past) :]


def _other_size(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what to do about phases that another global batch size moves; empty if it is the same."""
    was, size = (
        {phase["start"] // phase["start_step"] for phase in fields["phases"] if phase["start_step"]}
        for fields in (stored, now)
    )
    if not was or not size or was == size:
        return ""
    return (
        "a phase begins after start_step x train.global_batch_size samples, and the size was "
        f"{was.pop()}, is {size.pop()}: set start_step so that the product remains"
    )


def _weights(phases: list[Any]) -> list[tuple[int, dict[str, int]]]:
    return [(phase["start"], phase["weights"]) for phase in phases]


def _shown_phases(phases: list[Any]) -> str:
    return "; ".join(
        f"{describe_weights(phase['weights'])} from step {phase['start_step']} on" for phase in phases
    )


def _additions(
    stored: Mapping[str, Any], now: Mapping[str, Any], used: list[str], before: list[Any], after: list[Any]
) -> list[str]:
    """Return what changes from a cursor on. ``before`` and ``after`` are the phases there, ``used`` the
    sources that were drawn from already."""
    lines = []
    for name, fields in now["sources"].items():
        first = next((phase["start_step"] for phase in now["phases"] if name in phase["weights"]), None)
        since = "with weight 0, for validation only" if first is None else f"from step {first} on"
        if name not in stored["sources"]:
            lines.append(f'new source "{name}" {since}')
        elif name not in used and fields != stored["sources"][name]:
            lines.append(f'source "{name}", of which no sample has been drawn, has other data {since}')
    removed = [name for name in stored["sources"] if name not in now["sources"]]
    lines += [
        f'source "{name}", of which no sample has been drawn, is left out'
        for name in removed
        if name not in used
    ]
    if _weights(before) != _weights(after):
        why = f" ({other_size})" if (other_size := _other_size(stored, now)) else ""
        lines.append(f"weights: {_shown_phases(after) or 'no further change'}{why}")
    return lines


def explain_difference(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for every field that differs between two fingerprints, without those of sources."""
    names = [*_MEANINGS, *sorted((stored.keys() | now.keys()) - {*_MEANINGS, *_OF_SOURCES})]
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
