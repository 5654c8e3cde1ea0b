"""The state of a run by a few small reads of its folder, for lists of many runs."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.run import lease, lineage, metadata
from kempnerforge.checkpoint.run.lineage import ResumePoint
from kempnerforge.checkpoint.run.metadata import RunRecord
from kempnerforge.cli.log_end import last_rows, lines_from_end, parse
from kempnerforge.errors import EXIT_FINISHED, EXIT_STOPPED, RunFolderError
from kempnerforge.goodput.event_log import LEDGER
from kempnerforge.goodput.run_history import METRICS
from kempnerforge.telemetry.jsonl import decode_value, encode_value

LEASE_SILENT_S = 600.0
"""A run on another host is taken for running while its lease was renewed this recently."""


@dataclass
class RunState:
    """What ``ls`` shows of a run."""

    run_dir: Path
    state: str = "unknown"
    """running, finished, stopped, failed, new (never started), or unknown."""
    reason: str = ""
    """How the last attempt ended, or why the state is unknown."""
    attempt: int = 0
    step: int = 0
    max_steps: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    seen: float | None = None
    """Time of the last sign of the run, in seconds since the epoch."""
    committed: int | None = None
    """Newest committed step."""
    size_bytes: int = 0
    """Size of the files in its committed steps. One that several steps link to counts once."""

    def to_json(self) -> dict[str, Any]:
        """Return the state with plain types."""
        values = {name: encode_value(value) for name, value in asdict(self).items()}
        return values | {"run_dir": str(self.run_dir)}


def is_run(folder: Path) -> bool:
    """Return whether ``folder`` is the folder of a run."""
    return os.path.isfile(folder / metadata.RUN_FILE)


def read_state(run_dir: Path) -> RunState:
    """Return the state of a run. What cannot be read becomes the reason of an unknown state."""
    state = RunState(run_dir)
    try:
        record = metadata.read(run_dir)
        if record is None:
            state.reason = f"{metadata.RUN_FILE} disappeared"
            return state
        state.attempt, state.seen = record.attempt, record.created
        cuts = lineage.cuts(run_dir)
        start = _read_logs(state, run_dir, cuts)
        _read_checkpoints(state, record.checkpoint_folder(run_dir), start)
        _read_end(state, record, run_dir)
    except (OSError, RunFolderError) as error:
        state.state, state.reason = "unknown", str(error)
    return state


def _read_logs(state: RunState, run_dir: Path, cuts: Sequence[ResumePoint]) -> Mapping[str, Any]:
    """Read step, losses and times. Return the last ``start`` event, or an empty one."""
    rows = last_rows(run_dir / METRICS, ("train/loss", "eval/loss"), cuts)
    if row := rows.get("train/loss"):
        state.step, state.loss = row["step"], _number(row["train/loss"])
    if row := rows.get("eval/loss"):
        state.eval_loss = _number(row["eval/loss"])
    times = [at for row in rows.values() if (at := _time_of(row)) is not None]
    start: Mapping[str, Any] = {}
    steps = [state.step]
    for line in lines_from_end(run_dir / LEDGER):
        event = parse(line)
        if event is None:
            continue
        if len(times) <= len(rows) and (at := _time_of(event)) is not None:
            times.append(at)
        if _is_step(event) and not any(
            cut.leaves_behind(event["step"], event.get("attempt", 0)) for cut in cuts
        ):
            steps.append(event["step"])
        if event.get("event") == "start":
            start = event
            break
    state.step = max(steps)
    state.seen = max([*times, state.seen or 0.0])
    return start


def _is_step(event: Mapping[str, Any]) -> bool:
    """Return whether an event of the ledger says how far its attempt was."""
    return event.get("event") in ("progress", "end", "resume") and type(event.get("step")) is int


def _read_checkpoints(state: RunState, checkpoints: Path, start: Mapping[str, Any]) -> None:
    """Read the newest committed step and the size of all, and the last step of the config."""
    try:
        steps = paths.list_folder(checkpoints).steps
    except FileNotFoundError:
        steps = []
    state.committed = max(steps, default=None)
    sizes: dict[int, int] = {}
    for step in steps:
        try:
            with os.scandir(checkpoints / paths.step_name(step)) as entries:
                for found in (entry.stat() for entry in entries if entry.is_file()):
                    sizes[found.st_ino] = found.st_size
        except FileNotFoundError:  # retention deleted it meanwhile
            continue
    config = start.get("config")
    state.size_bytes = sum(sizes.values())
    last = config.get("train.max_steps") if isinstance(config, dict) else None
    if last is None and state.committed is not None:
        last = _stored_max_steps(checkpoints / paths.step_name(state.committed) / paths.CONFIG)
    state.max_steps = last if type(last) is int else None


def _stored_max_steps(file: Path) -> Any:
    try:
        train = tomli.loads(file.read_text()).get("train")
    except (FileNotFoundError, ValueError):
        return None
    return train.get("max_steps") if isinstance(train, dict) else None


def _read_end(state: RunState, record: RunRecord, run_dir: Path) -> None:
    """Derive the state from the lease, and from how the last attempt ended."""
    if holder := lease.live_holder(run_dir):
        silent_s = time.time() - max(path.stat().st_mtime for path in run_dir.glob("lease.*.json"))
        if silent_s < LEASE_SILENT_S:
            state.state, state.reason = "running", holder
            return
    ended = record.last_exit or {}
    if ended.get("attempt") == record.attempt:
        kinds = {EXIT_FINISHED: "finished", EXIT_STOPPED: "stopped"}
        state.state, state.reason = kinds.get(ended.get("status", 1), "failed"), str(ended.get("reason", ""))
        return
    kind, state.reason = _ledger_end(run_dir, record.attempt)
    kinds_of_ledger = {"finished": "finished", "stopped": "stopped", "deadline": "stopped"}
    state.state = kinds_of_ledger.get(kind, "failed") if record.attempt else "new"


def _ledger_end(run_dir: Path, attempt: int) -> tuple[str, str]:
    """Return kind and reason of the end of ``attempt``. Loops of one's own record it only in the ledger."""
    for line in lines_from_end(run_dir / LEDGER):
        event = parse(line)
        if event and event.get("event") == "end" and event.get("attempt") == attempt:
            return str(event.get("kind")), str(event.get("reason"))
    return "lost", "no end was recorded: killed, or its node was lost"


def _time_of(row: Mapping[str, Any]) -> float | None:
    """Return the time of a row; None if it has none, or one that is not finite."""
    at = _number(row.get("time"))
    return at if at is not None and math.isfinite(at) else None


def _number(content: Any) -> float | None:
    number = decode_value(content)
    if not isinstance(number, int | float) or isinstance(number, bool):
        return None
    try:
        return float(number)
    except OverflowError:  # an integer that no float holds
        return None
