"""The input of a save (``RunContext``, ``Payload``) and its ``SaveReport``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from kempnerforge.goodput.run_history import RunHistory


def _any_difference(
    stored: Mapping[str, Any], now: Mapping[str, Any], samples: int
) -> tuple[list[str], list[str]]:
    return ([] if stored == now else [f"fingerprint was {dict(stored)}, is {dict(now)}"]), []


@dataclass(frozen=True)
class RunContext:
    """Facts of the run that a checkpoint records and a resume compares."""

    run_id: str = ""
    attempt: int = 0
    layout: dict[str, int] = field(default_factory=dict[str, int])
    versions: dict[str, str] = field(default_factory=dict[str, str])
    config_toml: str = ""
    tokenizer: dict[str, str] = field(default_factory=dict[str, str])
    """See ``Provenance.tokenizer``."""
    allow_changed_data: bool = False
    """Whether a resume accepts a checkpoint that was trained on other data."""
    explain_data: Callable[[Mapping[str, Any], Mapping[str, Any], int], tuple[list[str], list[str]]] = (
        _any_difference
    )
    """Takes the stored and the current data fingerprint, and the samples consumed. Returns one line for
    each difference that changes these samples, and one for each that changes only those to come."""
    history: RunHistory | None = None
    """The records of earlier attempts. None: a resume reads those in the run's folder."""


@dataclass(frozen=True)
class Payload:
    """What one rank saves."""

    tensors: Mapping[str, torch.Tensor]
    """By name in the checkpoint."""
    objects: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Non-tensor leaves by name, encoded by ``json_values``. If several ranks have a leaf, the value of the
    lowest rank is stored."""
    same_on_all_ranks: Mapping[str, str] = field(default_factory=dict[str, str])
    """Name -> digest of each value that must be equal on all ranks."""
    from_lowest_rank: frozenset[str] = frozenset()
    """Names of tensors to take from the lowest rank that has them. Ranks may have different values, and a
    mixture of them would be a state that never existed."""
    frozen: frozenset[str] = frozenset()
    """Names of tensors that training does not change. A save may link files that have the same bytes."""


@dataclass(frozen=True)
class SaveReport:
    """The outcome of a save. The same on all ranks except for the timings."""

    step: int
    reason: str
    blocking_s: float
    write_s: float = 0.0
    commit_s: float = 0.0
    total_s: float = 0.0
    """From the call to the commit."""
    size_bytes: int = 0
    """Bytes of the step."""
    linked_bytes: int = 0
    """Bytes of the step that were not written: its files of frozen tensors are links to those of an earlier
    step."""
    lag_steps: int = 0
    """Steps from the one that was saved to the one at which all ranks knew the outcome."""
    deferred: int = 0
    """Steps by which the save was deferred because an earlier one was being written."""
    overhead_s: float = 0.0
    """Seconds by which the save has lengthened the loop, as far as known. See ``schedule/overhead.py``."""
    overhead_is_lower_bound: bool = False
    """Whether only blocking time was counted, because no baseline was available."""
    overhead_pct: float = 0.0
    """The cost of all saves of this attempt, in percent of its time in the loop."""
    interval_s: float | None = None
    """Current seconds between saves, on the first rank. None unless "auto" or ``max_overhead_pct`` is set."""
    pending: bool = False
    """Whether the save has begun and not ended."""
    skipped: str = ""
    """Why the save was skipped for lack of space; empty if it was not."""
    error: str = ""
    """Why the save failed; empty if it was committed."""
    warnings: tuple[str, ...] = ()
    """What failed after the commit: the ``latest`` link or retention."""

    @property
    def tax_s(self) -> float:
        """Deprecated: the former name of ``overhead_s``."""
        return self.overhead_s

    @property
    def tax_is_lower_bound(self) -> bool:
        """Deprecated: the former name of ``overhead_is_lower_bound``."""
        return self.overhead_is_lower_bound

    @property
    def written_bytes(self) -> int:
        """Bytes that the save has written."""
        return self.size_bytes - self.linked_bytes

    def row(self) -> dict[str, Any]:
        """Return the report as metrics. The caller adds ``step``, the step at which the row is written."""
        if self.skipped:
            return {"checkpoint/skipped_no_space": 1, "checkpoint/error": self.skipped}
        if self.error:
            return {"checkpoint/blocking_s": self.blocking_s, "checkpoint/error": self.error}
        return {
            "checkpoint/step": self.step,
            "checkpoint/reason": self.reason,
            "checkpoint/blocking_s": self.blocking_s,
            "checkpoint/write_s": self.write_s,
            "checkpoint/commit_s": self.commit_s,
            "checkpoint/total_s": self.total_s,
            "checkpoint/size_bytes": self.size_bytes,
            "checkpoint/written_bytes": self.written_bytes,
            "checkpoint/write_gb_per_s": self.written_bytes / max(self.write_s, 1e-9) / 1e9,
            "checkpoint/lag_steps": self.lag_steps,
            "checkpoint/deferred": self.deferred,
            "checkpoint/overhead_s": self.overhead_s,
            "checkpoint/overhead_is_lower_bound": self.overhead_is_lower_bound,
            "checkpoint/tax_s": self.overhead_s,  # deprecated, as the next one: names before 0.2
            "checkpoint/tax_is_lower_bound": self.overhead_is_lower_bound,
            "checkpoint/overhead_pct": self.overhead_pct,
            **({} if self.interval_s is None else {"checkpoint/interval_s": self.interval_s}),
        }
