"""``[[data.sources]]`` and ``[[data.phases]]``: several sources of tokens, mixed by weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field

from kempnerforge.config.section import AtLeastOne, NonEmpty, NotNegative, Section
from kempnerforge.config.suggestions import nearest
from kempnerforge.errors import ConfigIssue

PARTS = 1_000_000
"""Weights are normalized to integers with this sum: six decimals."""

Text = NonEmpty | Annotated[list[NonEmpty], Field(min_length=1)]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class DataSourceConfig(Section):
    """One source of a mixture: text or prepared tokens, and its share of the samples."""

    name: NonEmpty
    """Name of the source, for the metrics and the phases. It determines the order of the source's
    samples, whatever its place in the list."""

    text: Text | None = None
    """As data.text."""

    dataset_path: NonEmpty | None = None
    """As data.dataset_path."""

    weight: NotNegative
    """Share of the samples, relative to the other sources, until the first phase begins. With 0 no
    sample is drawn."""

    when_used_up: Literal["repeat", "stop"] = "repeat"
    """What follows the last sample of the source. repeat: all its samples again, in another order.
    stop: the run ends before the first batch that would repeat one."""


class DataPhaseConfig(Section):
    """A change of the weights of the sources in the course of the training."""

    start_step: AtLeastOne
    """Batches that are drawn when this many steps are done, and later ones, have these weights."""

    weights: dict[str, NotNegative]
    """Name of a source -> its share of the samples. Sources that are left out have weight 0."""


def normalized(weights: Mapping[str, float]) -> dict[str, int]:
    """Return ``weights`` in parts of a million, which sum to ``PARTS`` exactly.

    Each share is rounded down to six decimals. The parts that are missing then go, one each, to the
    largest remainders, among equals to the names that come first in the alphabet.

    Raises ValueError if the sum is 0, or a weight above 0 would become 0.
    """
    exact = {name: Fraction(repr(weight)) for name, weight in weights.items()}
    total = sum(exact.values())
    if total <= 0:
        raise ValueError("all weights are 0")
    shares = {name: PARTS * weight / total for name, weight in exact.items()}
    parts = {name: int(share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: (parts[name] - shares[name], name))
    for name in by_remainder[: PARTS - sum(parts.values())]:
        parts[name] += 1
    for name, share in shares.items():
        if share > 0 and parts[name] == 0:
            raise ValueError(
                f'the weight of "{name}", {weights[name]:g}, is less than a millionth of their sum'
            )
    return parts


def source_issues(sources: Sequence[DataSourceConfig]) -> list[ConfigIssue]:
    """Return what is wrong with ``[[data.sources]]`` alone."""
    faults: list[ConfigIssue] = []
    names = [source.name for source in sources]
    for index, source in enumerate(sources):
        key = f"data.sources[{index}]"
        if not _NAME.fullmatch(source.name):
            hint = "use letters, digits, and . _ - after the first one"
            faults.append(ConfigIssue(f"{key}.name", f'"{source.name}" cannot be part of a metric', hint))
        if source.name in names[:index]:
            problem = f'"{source.name}" is also the name of sources[{names.index(source.name)}]'
            faults.append(ConfigIssue(f"{key}.name", problem, "give each source a name of its own"))
        given = [name for name in ("text", "dataset_path") if getattr(source, name) is not None]
        if len(given) != 1:
            problem = (
                "text and dataset_path are both set" if given else "neither text nor dataset_path is set"
            )
            faults.append(ConfigIssue(f"{key}.text", problem, f'set one of them for "{source.name}"'))
    return faults + _weight_issues("data.sources", {source.name: source.weight for source in sources})


def phase_issues(phases: Sequence[DataPhaseConfig], names: Sequence[str]) -> list[ConfigIssue]:
    """Return what is wrong with ``[[data.phases]]``, where ``names`` are those of the sources."""
    faults: list[ConfigIssue] = []
    for index, phase in enumerate(phases):
        key = f"data.phases[{index}]"
        if index and phase.start_step <= (before := phases[index - 1].start_step):
            problem = f"{phase.start_step} is not above the start_step of the phase before, {before}"
            faults.append(ConfigIssue(f"{key}.start_step", problem, "write the phases in their order"))
        unknown = [name for name in phase.weights if name not in names]
        for name in unknown:
            close = nearest(name, names)
            hint = f'did you mean "{close}"?' if close else f"known: {', '.join(names)}"
            faults.append(ConfigIssue(f"{key}.weights", f'"{name}" is not the name of a source', hint))
        if not unknown:
            faults += _weight_issues(f"{key}.weights", phase.weights)
    return faults


def _weight_issues(key: str, weights: Mapping[str, float]) -> list[ConfigIssue]:
    try:
        normalized(weights)
    except ValueError as error:
        return [ConfigIssue(key, str(error), "raise one, or leave out what is not to be drawn")]
    return []
