"""Rollbacks, followed by saves of the next attempt, and the commands."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.ckpt_cli import Ckpt
from support.rollback_fixtures import log, names, quiet, resume, save

from kempnerforge.checkpoint.format import manifest, paths
from kempnerforge.checkpoint.run import lineage, resume_report
from kempnerforge.checkpoint.tools import rollback
from kempnerforge.checkpoint.tools.verify import verify
from kempnerforge.goodput.run_history import last_logged_step

pytest_plugins = ["support.ckpt_fixtures", "support.rollback_fixtures"]


@pytest.fixture
def run(ended_run: Path) -> Path:
    return ended_run


@pytest.mark.smoke
def test_late_step_is_set_aside_and_never_chosen(run: Path) -> None:
    assert resume(run) == 12
    save(run, 16, attempt=2)
    save(run, 20, attempt=1)
    assert resume(run) == 16
    assert "late.step_00000020.1" in names(run)
    assert verify(run / "checkpoints" / "late.step_00000020.1").sound
    assert paths.list_folder(run / "checkpoints").late == [run / "checkpoints" / "late.step_00000020.1"]
    save(run, 20, attempt=1)
    moved = lineage.set_aside_late(run / "checkpoints", lineage.cuts(run), run_id="abc")
    assert [path.name for path in moved] == ["late.step_00000020.2"]


@pytest.mark.smoke
def test_rollback_sets_later_steps_aside_and_run_resumes(run: Path) -> None:
    done = rollback.roll_back(run, 4, progress=quiet)
    assert done.renamed == {
        "step_00000012": "rolledback.step_00000012.1",
        "step_00000008": "rolledback.step_00000008.1",
    }
    assert names(run) == ["latest", *sorted(done.renamed.values()), "step_00000004"]
    assert os.readlink(run / "checkpoints" / "latest") == "step_00000004"
    assert verify(run / "checkpoints" / "rolledback.step_00000012.1").sound
    assert resume(run) == 4
    # 13 steps were logged; none of those after step 4 counts as lost: they were given up on purpose.
    assert resume_report.read_receipts(run)[-1]["lost_steps"] == 0
    log(run, attempt=3, steps=range(5, 8))
    assert last_logged_step(run, lineage.rollbacks(run)) == 7
    save(run, 8, attempt=3, parent=4)
    assert resume(run) == 8
    assert manifest.load(run / "checkpoints" / "step_00000008").provenance.parent_step == 4


@pytest.mark.smoke
def test_rollback_of_second_timeline_works(run: Path) -> None:
    rollback.roll_back(run, 4, progress=quiet)
    assert resume(run) == 4
    save(run, 8, attempt=3, parent=4)
    done = rollback.roll_back(run, 4, progress=quiet)
    assert done.renamed == {"step_00000008": "rolledback.step_00000008.2"}
    assert resume(run) == 4


@pytest.mark.smoke
def test_rollback_and_fork_commands_report_result(ckpt: Ckpt, run: Path, tmp_path: Path) -> None:
    done = ckpt("rollback", run, 8)
    assert done.status == 0, done.err
    assert "step_00000012 -> rolledback.step_00000012.1\n" in done.out
    assert f"kempnerforge ckpt rollback {run} --undo" in done.out
    done = ckpt("rollback", run, "--undo", "--json")
    assert json.loads(done.out)["newest_step"] == 12
    done = ckpt("rollback", run, 12)
    assert "is already the newest" in done.out
    done = ckpt("fork", run / "checkpoints" / "step_00000008", tmp_path / "new", "--link")
    assert done.status == 0, done.err
    assert f"--run.dir={tmp_path / 'new'}" in done.out
    done = ckpt("fork", run / "checkpoints" / "step_00000008", tmp_path / "two", "--json")
    assert json.loads(done.out)["parent"]["step"] == 8


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["rollback", "RUN", "6"], 2, "no committed step 6"),
        (["rollback", "RUN"], 2, "give either STEP or --undo"),
        (["rollback", "RUN", "4", "--undo"], 2, "give either STEP or --undo"),
        (["rollback", "RUN", "--undo"], 2, "no rollback"),
        (["rollback", "RUN/metrics.jsonl", "4"], 2, "is not a folder"),
        (["rollback", "RUN", "four"], 2, "four"),
        (["fork", "RUN", "RUN/new"], 2, "is not the folder of one step"),
        (["fork", "RUN/checkpoints/step_00000004", "RUN"], 2, "exists; a fork creates a new"),
    ],
)
def test_rollback_and_fork_bad_arguments_exit_2(
    ckpt: Ckpt, run: Path, arguments: list[str], status: int, text: str
) -> None:
    """Reported without a traceback."""
    done = ckpt(*(argument.replace("RUN", str(run)) for argument in arguments))
    assert done.status == status, done.out + done.err
    assert text in done.err
    assert "Traceback" not in done.err
