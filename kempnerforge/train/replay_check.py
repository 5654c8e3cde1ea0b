"""Check a resume: compare losses that are computed again with the recorded ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kempnerforge.checkpoint.run.resume_report import Receipt
from kempnerforge.telemetry.jsonl import read_rows

COMPARED_STEPS = 5


class ReplayCheck:
    """Compares the first losses after a resume with the rows of the attempt that lost those steps."""

    def __init__(self, recorded: Mapping[int, float] | None = None) -> None:
        self._recorded = dict(recorded or {})
        self._equal = 0

    @classmethod
    def of(cls, metrics: Path, receipt: Receipt) -> ReplayCheck:
        """Collect the losses to compare: none, unless steps were lost and bitwise equality is promised."""
        if not receipt.bitwise() or receipt.lost_steps == 0 or not metrics.exists():
            return cls()
        last = receipt.step + min(COMPARED_STEPS, receipt.lost_steps)
        # If several attempts logged a step, the newest before this one is used.
        return cls(
            {
                row["step"]: row["train/loss"]
                for row in read_rows(metrics).rows
                if "train/loss" in row
                and receipt.step < row["step"] <= last
                and row["attempt"] < receipt.attempt
            }
        )

    def compare(self, step: int, loss: float) -> str | None:
        """Return a message at the first difference, or after the last loss if all are equal; else None."""
        if step not in self._recorded:
            return None
        recorded = self._recorded.pop(step)
        if repr(recorded) != repr(loss):
            self._recorded.clear()
            return (
                f"warning: the loss of step {step} is {loss!r} and was {recorded!r} before the resume: "
                "this attempt does not repeat the one before it bit for bit"
            )
        self._equal += 1
        if self._recorded:
            return None
        return f"the first {self._equal} losses after the resume equal those recorded, bit for bit"
