"""The program of the ranks in a campaign: save small known states with the real manager."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from support.crash.file_operations import install
from support.crash.file_watcher import Control, Watch
from support.crash.known_states import (
    check_step,
    expected_tensors,
    make_state,
    rank_here,
    ranks_here,
    set_step,
)

from kempnerforge.checkpoint import manager as manager_module
from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.manager import CheckpointManager
from kempnerforge.checkpoint.results import RunContext, SaveReport
from kempnerforge.checkpoint.save import writer_client as writer_module
from kempnerforge.checkpoint.save.pipeline import RetryPolicy
from kempnerforge.checkpoint.state.train_state import TrainState
from kempnerforge.config.schema import AsyncCheckpointMode, CheckpointConfig
from kempnerforge.errors import SaveFailedError

STALL_TIMEOUT_S = 30.0
HOUSEKEEPING_WAIT_S = 60.0


@dataclass(frozen=True)
class Plan:
    """The program of one process group in a campaign."""

    run_dir: str
    steps: tuple[int, ...] = ()
    """Steps to save, in order. Those up to the resumed step are skipped."""
    keep_last_n: int = 1
    mode: str = "async"
    attempt: int = 1
    wait: bool = True
    """Whether to wait for each save. If not, saves overlap with the following work, as in training."""
    log: str = ""
    """The file for the recording; empty to watch nothing."""
    control: str = ""
    no_direct: bool = False
    reason: str = "interval"
    operation_s: float = 0.0
    """Duration of an operation that a fault hits, by the clock of the rank whose writer does it."""


def make_manager(plan: Plan, state: TrainState) -> CheckpointManager:
    """Return the manager as training creates it, but with shorter time limits."""
    return _make(plan, state)[0]


def _make(plan: Plan, state: TrainState) -> tuple[CheckpointManager, AsyncCheckpointer]:
    group = None
    if dist.is_initialized():
        new = dist.new_group(backend="gloo", timeout=timedelta(seconds=60))
        assert isinstance(new, dist.ProcessGroup)
        group = new
    config = CheckpointConfig(
        keep_last_n=plan.keep_last_n,
        async_mode=AsyncCheckpointMode(plan.mode),
        interval=1,
        max_failed_saves=1000,
        save_last=False,
    )
    layout_of_run = {"num_ranks": ranks_here()}
    context = RunContext(run_id="r", attempt=plan.attempt, layout=layout_of_run, config_toml="a = 1\n")
    run_dir = Path(plan.run_dir)
    patience = RetryPolicy(write_tries=3, first_pause_s=0.01, save_timeout_s=30.0)
    made: list[AsyncCheckpointer] = []

    def less_patient(mode: AsyncCheckpointMode, **_: Any) -> AsyncCheckpointer:
        made.append(AsyncCheckpointer(mode, patience=patience, stall_timeout_s=STALL_TIMEOUT_S))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager_module, "AsyncCheckpointer", less_patient)
        manager = CheckpointManager(
            config, state=state, run_dir=run_dir, control_group=group, context=context
        )
    (checkpointer,) = made
    return manager, checkpointer


def begin(plan: Plan) -> tuple[TrainState, CheckpointManager, AsyncCheckpointer]:
    """Watch this rank and its writer if requested, then create what a training run has."""
    if plan.log:
        install(Watch(plan.run_dir, plan.log, plan.control, f"rank{rank_here()}", plan.no_direct))
    state = make_state()
    return state, *_make(plan, state)


def save_all(plan: Plan) -> dict[str, Any]:
    """Resume, then save every later step of the plan. Return what this rank knows."""
    state, manager, _ = begin(plan)
    receipt = manager.resume(state)
    reports: list[SaveReport] = []
    try:
        for step in plan.steps:
            if step > receipt.step:
                manager.wait_for_staging()
                set_step(state, step)
                manager.save(state, wait=plan.wait, reason=plan.reason)
                reports += manager.poll()
        manager.finish(state)
        reports += manager.poll()
    finally:
        manager.close()
    rejected = [one.reason for one in receipt.rejected]
    return {"resumed": receipt.step, "errors": [r.error for r in reports], "rejected": rejected}


@dataclass(frozen=True)
class Strike:
    """A fault to arm before a save."""

    role: str
    nth: int
    kind: str
    count: int = 1
    value: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """The result of one save on one rank."""

    step: int
    error: str
    names: tuple[str, ...]
    """Names in the folder of checkpoints, on rank 0."""
    replaced: bool = False
    """Whether this rank's writer process was replaced."""


@dataclass(frozen=True)
class Struck:
    """A save for which a fault was armed, and the save after it."""

    strike: Strike
    fired: int
    """Number of operations that the fault has hit, on rank 0."""
    hit: Outcome
    after: Outcome


class WriterClock:
    """Replaces ``time`` in the code with which a rank watches its writer, so that time limits expire at once.

    At every look, a writer that is stopped has been stopped for ``STALL_TIMEOUT_S`` longer, and
    every operation that a fault hit has taken ``operation_s``.
    """

    def __init__(self, checkpointer: AsyncCheckpointer, control: Control, operation_s: float) -> None:
        self.operation_s = operation_s
        self._checkpointer = checkpointer
        self._control = control
        self._fired = 0
        self._skipped_s = 0.0

    def monotonic(self) -> float:
        """Return the time."""
        fired, before = self._control.fired, self._fired
        self._fired = fired
        self._skipped_s += self.operation_s * max(0, fired - before)
        if _is_stopped(self._checkpointer.writer_pid):
            self._skipped_s += 1.1 * STALL_TIMEOUT_S
        return time.monotonic() + self._skipped_s


def _is_stopped(pid: int | None) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
    return False


def save_under_faults(plan: Plan, strikes: list[Strike]) -> list[Struck]:
    """For every strike, make one save with the fault and one without. Rank 0 checks every bit after each.

    The first two saves have no fault, so that every later save has an older one to delete.
    """
    state, manager, checkpointer = begin(plan)
    control = Control(Path(plan.control))
    clock = WriterClock(checkpointer, control, plan.operation_s)
    writer_module.time = clock  # type: ignore[assignment]
    manager.resume(state)
    found: list[Struck] = []

    def save(step: int) -> Outcome:
        pid, outcome = checkpointer.writer_pid, _save(manager, state, step, plan.reason)
        return replace(outcome, replaced=pid not in (None, checkpointer.writer_pid))

    try:
        for step in (1, 2):
            assert save(step).error == ""
        for number, strike in enumerate(strikes):
            clock.operation_s = plan.operation_s if strike.role == f"writer{rank_here()}" else 0.0
            if rank_here() == 0:
                control.arm(strike.role, strike.nth, strike.kind, count=strike.count, value=strike.value)
            hit = save(2 * number + 3)
            fired = control.fired if rank_here() == 0 else 0
            _barrier()
            if rank_here() == 0:
                control.disarm()
            after = save(2 * number + 4)
            found.append(Struck(strike, fired, hit, after))
    finally:
        manager.close()
    return found


def _save(manager: CheckpointManager, state: TrainState, step: int, reason: str) -> Outcome:
    set_step(state, step)
    _barrier()
    error = ""
    try:
        manager.save(state, wait=True, reason=reason)
    except SaveFailedError as failed:
        error = str(failed)
    manager.poll()
    manager._housekeeping.wait(HOUSEKEEPING_WAIT_S)  # the work after the commit is part of what can be hit
    _barrier()
    names: list[str] = []
    if rank_here() == 0:
        names = sorted(os.listdir(manager.folder))
        for there in paths.committed_steps(manager.folder):
            check_step(manager.folder / paths.step_name(there), there, expected_tensors(there, ranks_here()))
    return Outcome(step, error, tuple(names))


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
