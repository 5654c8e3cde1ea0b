"""A few columns of ``metrics.jsonl`` as plain numbers: what a plot needs of a run of a million rows.

Parsed by pydantic's parser: half of a gigabyte of rows took it 2 s, and ``json`` 7.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic_core import from_json

from kempnerforge import fsio
from kempnerforge.telemetry.jsonl import decode_value, last_step_that_counts


@dataclass
class Curve:
    """One metric over steps, in the order of the file."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))
    """Not all of them need be finite."""


@dataclass
class Curves:
    """The metrics of a run, each with the rows that count apart from those of steps that were done again."""

    counting: dict[str, Curve]
    repeated: dict[str, dict[int, Curve]]
    """By metric and attempt."""


def read_curves(path: Path, keys: Sequence[str], resumes: Mapping[int, int]) -> Curves:
    """The metrics ``keys`` of a ``metrics.jsonl``; lines that are no rows are left out. No file is no rows.

    Args:
        resumes: attempt -> the step it resumed from, as for ``effective_rows``.

    Raises:
        OSError: the file cannot be read.
    """
    found = Curves({key: Curve() for key in keys}, {key: {} for key in keys})
    last: dict[int, float] = {}
    try:
        file = os.fdopen(fsio.open_to_read(path), "rb")
    except FileNotFoundError:
        return found
    with file:
        for line in file:
            try:
                row = from_json(line)
            except ValueError:  # torn
                continue
            if not isinstance(row, dict) or not all(type(row.get(key)) is int for key in ("step", "attempt")):
                continue
            step, attempt = row["step"], row["attempt"]
            if attempt not in last:
                last[attempt] = last_step_that_counts(attempt, resumes)
            counts = step <= last[attempt]
            for key in keys:
                value = decode_value(row.get(key))
                if isinstance(value, int | float):
                    curve = (
                        found.counting[key] if counts else found.repeated[key].setdefault(attempt, Curve())
                    )
                    curve.steps.append(step)
                    curve.values.append(value)
    return found
