"""What ranks do in a campaign: save small known states with the real manager, while they are watched."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

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

from kempnerforge.checkpoint import layout
from kempnerforge.checkpoint.background import Patience
from kempnerforge.checkpoint.manager import CheckpointManager
from kempnerforge.checkpoint.report import RunContext, SaveReport
from kempnerforge.checkpoint.state import TrainState
from kempnerforge.config.schema import CheckpointConfig
from kempnerforge.errors import SaveFailedError


@dataclass(frozen=True)
class Plan:
    """One process group's part in a campaign."""

    run_dir: str
    steps: tuple[int, ...] = ()
    """Steps to save, in order; those up to the one that was resumed are left out."""
    keep_last_n: int = 1
    mode: str = "async"
    attempt: int = 1
    wait: bool = True
    """Whether to wait for each save; if not, saves overlap with what follows, as in training."""
    log: str = ""
    """Where to record; empty: nothing is watched."""
    control: str = ""
    no_direct: bool = False
    stall_timeout_s: float = 30.0
    reason: str = "interval"


def make_manager(plan: Plan, state: TrainState) -> CheckpointManager:
    """The manager as training makes it, but less patient."""
    group = None
    if dist.is_initialized():
        made = dist.new_group(backend="gloo", timeout=timedelta(seconds=30))
        assert isinstance(made, dist.ProcessGroup)
        group = made
    config = CheckpointConfig.model_validate(
        {"keep_last_n": plan.keep_last_n, "async_mode": plan.mode, "interval": 1, "max_failed_saves": 1000}
    )
    layout_of_run = {"num_ranks": ranks_here()}
    context = RunContext(run_id="r", attempt=plan.attempt, layout=layout_of_run, config_toml="a = 1\n")
    run_dir = Path(plan.run_dir)
    manager = CheckpointManager(config, state=state, run_dir=run_dir, control_group=group, context=context)
    manager._checkpointer._patience = Patience(write_tries=3, first_pause_s=0.01, save_timeout_s=30.0)
    manager._checkpointer._writer._stall_timeout_s = plan.stall_timeout_s
    return manager


def begin(plan: Plan) -> tuple[TrainState, CheckpointManager]:
    """Watch this rank and its writer if that is asked for, then make what a training run has."""
    if plan.log:
        install(Watch(plan.run_dir, plan.log, plan.control, f"rank{rank_here()}", plan.no_direct))
    state = make_state()
    return state, make_manager(plan, state)


def save_all(plan: Plan) -> dict[str, Any]:
    """Resume, then save every step of the plan that comes after. Returns what this rank learnt."""
    state, manager = begin(plan)
    receipt = manager.resume(state)
    reports: list[SaveReport] = []
    try:
        for step in plan.steps:
            if step > receipt.step:
                manager.wait_for_staging()
                set_step(state, step)
                manager.save(state, wait=plan.wait, reason=plan.reason)
                reports += manager.poll()
        manager._saver.settle(state.step)
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
    """What a rank knows of one save."""

    step: int
    error: str
    names: tuple[str, ...]
    """What is in the folder of checkpoints, if this is rank 0."""
    replaced: bool
    """Whether this rank's writer is another process than before."""


@dataclass(frozen=True)
class Struck:
    """A save that a fault was armed for, and the one after it."""

    strike: Strike
    fired: int
    """Operations that the fault has hit; known by rank 0."""
    hit: Outcome
    after: Outcome


def save_under_faults(plan: Plan, strikes: list[Strike]) -> list[Struck]:
    """For every strike: one save that it is meant for, then one without. Rank 0 checks every bit after each.

    The first two saves of all have no fault, so that every save afterwards has an older one to delete.
    """
    state, manager = begin(plan)
    control = Control(Path(plan.control))
    manager.resume(state)
    found: list[Struck] = []
    try:
        for step in (1, 2):
            assert _save(manager, state, step, plan.reason).error == ""
        for number, strike in enumerate(strikes):
            if rank_here() == 0:
                control.arm(strike.role, strike.nth, strike.kind, count=strike.count, value=strike.value)
            hit = _save(manager, state, 2 * number + 3, plan.reason)
            fired = control.fired if rank_here() == 0 else 0
            _barrier()
            if rank_here() == 0:
                control.disarm()
            after = _save(manager, state, 2 * number + 4, plan.reason)
            found.append(Struck(strike, fired, hit, after))
    finally:
        manager.close()
    return found


def _save(manager: CheckpointManager, state: TrainState, step: int, reason: str) -> Outcome:
    set_step(state, step)
    _barrier()
    pid, error = manager._checkpointer.writer_pid, ""
    try:
        manager.save(state, wait=True, reason=reason)
    except SaveFailedError as failed:
        error = str(failed)
    manager.poll()
    _barrier()
    names: list[str] = []
    if rank_here() == 0:
        names = sorted(os.listdir(manager.folder))
        for there in layout.committed_steps(manager.folder):
            check_step(manager.folder / layout.step_name(there), there, expected_tensors(there, ranks_here()))
    return Outcome(step, error, tuple(names), pid not in (None, manager._checkpointer.writer_pid))


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
