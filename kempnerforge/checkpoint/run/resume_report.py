"""The resume receipt: what was chosen, what was rejected and why, what was lost, what changed."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kempnerforge import fsio
from kempnerforge.checkpoint.run import metadata

RECEIPTS = "receipts.jsonl"
METRICS = "metrics.jsonl"


_OF_STOPS = (
    *("train.shutdown_timeout_s", "train.max_minutes", "train.deadline_margin_s"),
    *("train.hang_multiple", "train.hang_floor_s", "distributed.timeout_s"),
)
"""Keys that say when a run ends or is reported, and nothing of what it computes."""


@dataclass(frozen=True)
class Rejected:
    """A step that was looked at and not used."""

    step: int
    outcome: str
    """``damaged``, ``suspect``, ``no training state`` (weights alone, say) or ``another run's``: the other
    outcomes end the run."""
    reason: str
    moved_to: str = ""
    """Its name now; empty for one that was left where it is."""

    def fate(self) -> str:
        """What became of it, in words."""
        if self.moved_to:
            return f"was {self.outcome}, set aside as {self.moved_to}"
        is_passed_over = self.outcome in ("damaged", "suspect")
        return f"was {self.outcome} and passed over" if is_passed_over else "was left as it is"


@dataclass
class Receipt:
    """How an attempt began. One line of ``receipts.jsonl``."""

    attempt: int
    source: str = "fresh start"
    """``fresh start``, ``resume`` or ``warm start``."""
    step: int = 0
    """Step that this attempt goes on from."""
    path: str = ""
    rejected: list[Rejected] = field(default_factory=list)
    lost_steps: int = 0
    """Steps that an earlier attempt had logged beyond ``step``; they are done again."""
    lost_committed: int = 0
    """The newest of these that had been committed, in a step that is set aside; 0 if none had."""
    config_changes: dict[str, list[Any]] = field(default_factory=dict)
    """Dotted key -> [value in the checkpoint, value now]."""
    layout_changes: dict[str, list[Any]] = field(default_factory=dict)
    version_changes: dict[str, list[Any]] = field(default_factory=dict)
    data_changes: list[str] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    """Where the config changes that of the next step: [by the checkpoint's config, by this one]."""
    keeps_schedule: str = ""
    """What to set to keep the checkpoint's schedule; empty where no key alone does."""
    rng: str = "derived from (seed, step, rank)"
    """``restored`` on the same layout and type of device."""
    nondeterministic: bool = False
    """Whether this attempt runs on a GPU without deterministic algorithms."""
    cursor: str = ""
    """``restored`` when the data goes on where it was, ``start`` when not; empty if no position is told."""
    extras: list[str] = field(default_factory=list)
    """Names of the extras whose state was restored."""
    empty_extras: list[str] = field(default_factory=list)
    """Names of the extras whose ``state_dict()`` had nothing in it."""
    next_batch: str = "not compared"
    """``proved`` when the next batch has the digest that was stored with the step."""
    not_loaded: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What the start could not tidy up, and the steps that it passed over for that."""
    space_warning: str = ""
    """What there is to say about the disk before training."""
    load_s: float = 0.0
    size_bytes: int = 0
    time: float = field(default_factory=time.time)

    def bitwise(self) -> bool:
        """Whether nothing was found that keeps this attempt from repeating an uninterrupted run bit for bit.

        ``train.max_steps`` counts as a difference: most schedules depend on it.
        """
        harmless = ("checkpoint.", "metrics.", "run.", "eval.", "data.cache_dir", *_OF_STOPS)
        changed = [key for key in self.config_changes if not key.startswith(harmless)]
        return (
            self.source == "resume"
            and self.rng == "restored"
            and not self.nondeterministic
            and not (changed or self.layout_changes or self.version_changes or self.data_changes)
        )

    def lines(self) -> list[str]:
        """The receipt for people."""
        warnings = [f"  warning: {one}" for one in self.warnings]
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
            result.append(f"  {self.lost_steps} steps after it are done again: {why}")
        for title in ("config", "layout", "version"):
            for key, (before, now) in getattr(self, f"{title}_changes").items():
                result.append(f"  {title}: {key} was {before!r}, is {now!r}")
        result += [f"  data: {change}" for change in self.data_changes]
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
            result.append("  for these changes, what follows may differ from an uninterrupted run")
        return result

    def _passed_over(self) -> list[str]:
        return [f"  step {one.step} {one.fate()}: {one.reason}" for one in self.rejected]

    def write(self, run_dir: Path) -> None:
        """Append to ``receipts.jsonl``, durably."""
        body = {**dataclasses.asdict(self), "bitwise": self.bitwise()}
        fsio.append_line(run_dir / RECEIPTS, json.dumps(body))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Keys whose values differ, with both values; None where a key is missing."""
    keys = sorted({*before, *now})
    return {key: [before.get(key), now.get(key)] for key in keys if before.get(key) != now.get(key)}


def read_receipts(run_dir: Path) -> list[dict[str, Any]]:
    """All receipts of a run, oldest first. Raises OSError.

    Lines that a crash tore are left out, and so are rows that are no receipts: others write to the file too.
    """
    try:
        lines = fsio.read_file(run_dir / RECEIPTS).splitlines()
    except FileNotFoundError:
        return []
    return [row for line in lines if (row := _row(line)) is not None and _is_receipt(row)]


def _is_receipt(row: Mapping[str, Any]) -> bool:
    return type(row.get("attempt")) is int and type(row.get("step")) is int


def last_logged_step(run_dir: Path) -> int:
    """Step of the last whole training row in ``metrics.jsonl`` that counts; 0 when there is none.

    What a rollback took back was given up on purpose: it is not lost, and counts no further than the step
    that the run went back to. Reads the end of the file only: it grows for weeks. Raises OSError and
    RunFolderError.
    """
    try:
        with os.fdopen(fsio.open_to_read(run_dir / METRICS), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 20)))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return 0
    record = metadata.read(run_dir)
    rollbacks = record.rollbacks if record is not None else ()
    for line in reversed(lines):
        row = _row(line)
        if row is not None and "train/loss" in row and _is_receipt({"attempt": 0, **row}):
            later = [one.step for one in rollbacks if one.attempt > row.get("attempt", 0)]
            return min([row["step"], *later])
    return 0


def _row(line: bytes) -> dict[str, Any] | None:
    """One line of JSON; None for one that a crash tore, or that was read from its middle."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
