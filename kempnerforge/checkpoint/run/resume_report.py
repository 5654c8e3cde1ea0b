"""The resume receipt: which step was chosen, which were rejected and why, what was lost, what changed."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kempnerforge import fsio

RECEIPTS = "receipts.jsonl"

_OF_STOPS = (
    *("train.shutdown_timeout_s", "train.max_minutes", "train.deadline_margin_s", "train.max_restarts"),
    *("train.hang_multiple", "train.hang_floor_s", "distributed.timeout_s"),
)
"""Keys that control when a run ends or what is reported, but not what it computes."""


@dataclass(frozen=True)
class Rejected:
    """A step that was examined but not used."""

    step: int
    outcome: str
    """``damaged``, ``suspect``, ``no training state`` (such as only weights) or ``another run's``.
    Other outcomes end the run."""
    reason: str
    moved_to: str = ""
    """Its new name; empty if it was not renamed."""

    def fate(self) -> str:
        """Return a description of what happened to it."""
        if self.moved_to:
            return f"was {self.outcome}, set aside as {self.moved_to}"
        is_passed_over = self.outcome in ("damaged", "suspect")
        return f"was {self.outcome} and skipped" if is_passed_over else "was left as it is"


@dataclass
class Receipt:
    """How an attempt began. One line of ``receipts.jsonl``."""

    attempt: int
    source: str = "fresh start"
    """``fresh start``, ``resume`` or ``warm start``."""
    step: int = 0
    """The step that this attempt starts from."""
    path: str = ""
    rejected: list[Rejected] = field(default_factory=list)
    lost_steps: int = 0
    """Number of steps that an earlier attempt is known to have done after ``step``. They are repeated."""
    lost_committed: int = 0
    """The newest of these that was committed and is set aside; 0 if there is none."""
    config_changes: dict[str, list[Any]] = field(default_factory=dict)
    """Dotted key -> [value in the checkpoint, value now]."""
    layout_changes: dict[str, list[Any]] = field(default_factory=dict)
    version_changes: dict[str, list[Any]] = field(default_factory=dict)
    data_changes: list[str] = field(default_factory=list)
    data_additions: list[str] = field(default_factory=list)
    """What changes in the data from here on: sources and phases of a mixture."""
    learning_rate: list[float] = field(default_factory=list)
    """If the config changes that of the next step: [by the checkpoint's config, by this config]."""
    keeps_schedule: str = ""
    """What to set to keep the checkpoint's schedule; empty if no single key does."""
    rng: str = "derived from (seed, step, rank)"
    """``restored`` with the same layout and type of device."""
    nondeterministic: bool = False
    """Whether this attempt runs on a GPU without deterministic algorithms."""
    cursor: str = ""
    """``restored`` if the data continues where it stopped, ``start`` if not; empty without a position."""
    extras: list[str] = field(default_factory=list)
    """Names of the extras whose state was restored."""
    empty_extras: list[str] = field(default_factory=list)
    """Names of the extras whose ``state_dict()`` was empty."""
    next_batch: str = "not compared"
    """``proved`` if the next batch has the digest stored with the step."""
    not_loaded: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What the start could not clean up, and the steps that it skipped for that reason."""
    space_warning: str = ""
    """A warning about disk space before training."""
    load_s: float = 0.0
    size_bytes: int = 0
    time: float = field(default_factory=time.time)

    def bitwise(self) -> bool:
        """Return whether this attempt should match an uninterrupted run bit for bit.

        This is true unless a known difference may change results. ``train.max_steps`` counts as a
        difference, because most schedules depend on it.
        """
        harmless = ("checkpoint.", "metrics.", "run.", "eval.", "data.cache_dir", *_OF_STOPS)
        changed = [key for key in self.config_changes if not key.startswith(harmless)]
        return (
            self.source == "resume"
            and self.rng == "restored"
            and not self.nondeterministic
            and not (
                changed
                or self.layout_changes
                or self.version_changes
                or self.data_changes
                or self.data_additions
            )
        )

    def lines(self) -> list[str]:
        """Return the receipt as text."""
        warnings = [f"  warning: {warning}" for warning in self.warnings]
        if self.source == "fresh start":
            return ["fresh start at step 0", *self._passed_over(), *warnings]
        verb = "resumed" if self.source == "resume" else "warm start"
        size = f"{self.size_bytes / 1e6:.1f} MB in {self.load_s:.2f} s"
        result = [f"{verb} from {self.path} at step {self.step} ({size})"]
        result += [*self._passed_over(), *warnings]
        if self.lost_steps:
            why = (
                f"step {self.lost_committed} was committed and is set aside"
                if self.lost_committed
                else "no checkpoint on this timeline has them"
            )
            result.append(f"  {self.lost_steps} steps after it are repeated: {why}")
        for title in ("config", "layout", "version"):
            for key, (before, now) in getattr(self, f"{title}_changes").items():
                result.append(f"  {title}: {key} was {before!r}, is {now!r}")
        result += [f"  data: {change}" for change in [*self.data_changes, *self.data_additions]]
        if self.learning_rate:
            before, now = self.learning_rate
            way_back = f" (to keep the old schedule: {self.keeps_schedule})" if self.keeps_schedule else ""
            result.append(f"  learning rate of the next step: was {before:.3g}, is {now:.3g}{way_back}")
        if self.not_loaded:
            result.append(f"  not loaded: {', '.join(self.not_loaded)}")
        if self.empty_extras:
            result.append(f"  without any state in the checkpoint: {', '.join(self.empty_extras)}")
        if self.extras:
            result.append(f"  restored too: {', '.join(self.extras)}")
        result.append(f"  rng {self.rng}" + (f"; data position: {self.cursor}" if self.cursor else ""))
        if self.nondeterministic:
            result.append("  algorithms: not deterministic (train.deterministic)")
        if self.source == "resume" and not self.bitwise():
            result.append("  because of these changes, results may differ from an uninterrupted run")
        return result

    def _passed_over(self) -> list[str]:
        return [
            f"  step {rejection.step} {rejection.fate()}: {rejection.reason}" for rejection in self.rejected
        ]

    def write(self, run_dir: Path) -> None:
        """Append to ``receipts.jsonl``, durably."""
        body = {**dataclasses.asdict(self), "bitwise": self.bitwise()}
        fsio.append_line(run_dir / RECEIPTS, json.dumps(body))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the keys whose values differ, with both values; None for a missing key."""
    keys = sorted({*before, *now})
    return {key: [before.get(key), now.get(key)] for key in keys if before.get(key) != now.get(key)}


def read_receipts(run_dir: Path) -> list[dict[str, Any]]:
    """Return all receipts of a run, oldest first. Raises OSError.

    Incomplete lines from a crash are ignored, and so are rows that are not receipts.
    """
    try:
        lines = fsio.read_file(run_dir / RECEIPTS).splitlines()
    except FileNotFoundError:
        return []
    return [row for line in lines if (row := _row(line)) is not None and _is_receipt(row)]


def _is_receipt(row: Mapping[str, Any]) -> bool:
    return type(row.get("attempt")) is int and type(row.get("step")) is int


def _row(line: bytes) -> dict[str, Any] | None:
    """Parse one line of JSON. Return None for an incomplete one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
