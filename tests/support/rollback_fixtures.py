"""A finished run, created without training: ``pytest_plugins = ["support.rollback_fixtures"]``."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kempnerforge import fsio
from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.manifest import Provenance
from kempnerforge.checkpoint.retention.start_cleanup import StartCleanup
from kempnerforge.checkpoint.run import lease, lineage, metadata
from kempnerforge.checkpoint.run.metadata import RunRecord
from kempnerforge.checkpoint.run.resume_report import Receipt
from kempnerforge.goodput.run_history import last_logged_step

CONFIG = "[train]\nglobal_batch_size = 6\n"


def quiet(*_: object) -> None:
    """Ignore progress and notes."""


def save(run: Path, step: int, *, attempt: int = 1, run_id: str = "abc", parent: int | None = None) -> Path:
    """Write a real checkpoint whose tensor contains the number of the step."""
    path = run / "checkpoints" / paths.step_name(step)
    provenance = Provenance(step=step, run_id=run_id, attempt=attempt, parent_step=parent, reason="interval")
    checkpointer = AsyncCheckpointer()
    counters = {"step": step, "tokens": 0, "skipped_steps": 0, "skipped_in_a_row": 0}
    checkpointer.save(
        {"model": {"w": torch.full((5000,), float(step))}, **counters},
        path,
        provenance=provenance,
        config_toml=CONFIG,
    )
    checkpointer.close()
    return path


@pytest.fixture(scope="module")
def ended_run_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one attempt that committed steps 4, 8 and 12 and ended. Do not change it."""
    run = tmp_path_factory.mktemp("template") / "run"
    for step in (4, 8, 12):
        save(run, step, parent=step - 4)
    record = RunRecord("abc", "abc", 1.0, attempt=1, global_batch_size=6)
    metadata.write(run, record)
    Receipt(1).write(run)
    log(run, attempt=1, steps=range(1, 14))
    fsio.point_symlink(run / "checkpoints" / paths.LATEST, paths.step_name(12))
    return run


@pytest.fixture
def ended_run(ended_run_template: Path, tmp_path: Path) -> Path:
    """A copy of ``ended_run_template`` that a test may change."""
    return Path(shutil.copytree(ended_run_template, tmp_path / "run", symlinks=True))


def log(run: Path, *, attempt: int, steps: range) -> None:
    """Append rows of metrics, as an attempt does."""
    with open(run / "metrics.jsonl", "a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "attempt": attempt, "train/loss": 1.0}) + "\n")


def resume(run: Path) -> int:
    """Do what a start of the run does, up to its receipt. Return the step that it resumes from."""
    held = lease.acquire(run, after_attempt=lineage.last_attempt(run))
    record = metadata.read(run)
    assert record is not None
    metadata.write(run, replace(record, attempt=held.attempt))
    folder = record.checkpoint_folder(run)
    StartCleanup(folder, attempt=held.attempt).revoke_inflight()
    lineage.set_aside_late(folder, lineage.cuts(run), run_id=record.run_id, at_start=True)
    step = max(paths.committed_steps(folder), default=0)
    lost_steps = max(0, last_logged_step(run, lineage.rollbacks(run)) - step)
    Receipt(held.attempt, source="resume", step=step, lost_steps=lost_steps).write(run)
    held.release()
    return step


def names(run: Path) -> list[str]:
    """Return the names in the folder of checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())
