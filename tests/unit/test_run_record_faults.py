"""Records of a run that cannot be read or written cost the record, never the run."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kempnerforge import fsio
from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.load import candidates as choosing
from kempnerforge.checkpoint.load.restore import Restorer
from kempnerforge.checkpoint.results import RunContext
from kempnerforge.checkpoint.run import lease, lineage, metadata
from kempnerforge.checkpoint.run.resume_report import Receipt
from kempnerforge.checkpoint.tools import rollback
from kempnerforge.config.schema import CheckpointConfig, JobConfig
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.errors import EXIT_FINISHED, DataError, RunFolderError
from kempnerforge.goodput.run_history import RunHistory
from kempnerforge.telemetry.console import ConsoleSink
from kempnerforge.train import run as running
from kempnerforge.train.metric_loggers import Reports, build_reports
from kempnerforge.train.run_dir import record_refusal, storage_error

pytest_plugins = ["support.rollback_fixtures"]

CPU = torch.device("cpu")
JOB = JobConfig.model_validate({"run": {"name": "one"}, "data": {"text": "x"}})


def reports_in(run_dir: Path) -> Reports:
    record, history = metadata.new(), RunHistory(run_dir)
    return build_reports(JOB, ConsoleSink(10, 1), device=CPU, folder=run_dir, record=record, history=history)


def test_unwritable_metrics_cost_rows_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    reports = reports_in(tmp_path)
    reports.write({"step": 1, "train/loss": 2.5})
    reports.close()
    assert "cannot write metrics" in caplog.text
    assert "2.5" in capsys.readouterr().out


def test_unreadable_metrics_compare_no_losses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    reports = reports_in(tmp_path)
    receipt = Receipt(2, source="resume", step=4, lost_steps=2, rng="restored", next_batch="proved")
    assert receipt.bitwise()
    assert reports.replay_check(receipt).compare(5, 2.5) is None
    assert "losses are not compared" in caplog.text


@pytest.mark.parametrize("content", [None, "{"], ids=["missing", "torn"])
def test_exit_that_cannot_be_recorded_warns(
    tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    if content is not None:
        (tmp_path / metadata.RUN_FILE).write_text(content)
    run: Any = SimpleNamespace(
        world=SimpleNamespace(rank=0),
        ckpt=SimpleNamespace(holds_lease=lambda: True),
        folder=tmp_path,
        state=SimpleNamespace(step=3),
    )
    running._record(run, EXIT_FINISHED, "finished")
    (warning,) = caplog.messages
    assert "how this attempt ended is not recorded" in warning


def test_refusal_that_cannot_be_recorded_passes(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    record_refusal(tmp_path / "checkpoints", tmp_path, DataError("no text"))
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_lease_listed_and_missing_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lease.1.json").write_text("")

    def stale(path: Path) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(fsio, "read_mark", stale)
    monkeypatch.setattr(lease, "_MOST_LOOKS", 2)
    monkeypatch.setattr(lease, "_LOOK_EVERY_S", 0.0)
    with pytest.raises(RunFolderError, match=r"cannot be read: .*lease\.1\.json"):
        lease.acquire(tmp_path)


def test_resume_lists_folder_again_after_error(ended_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listings: list[Path] = []
    real = lineage.set_aside_late

    def fail_once(folder: Path, *args: Any, **options: Any) -> list[Path]:
        listings.append(folder)
        if len(listings) == 1:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(folder))
        return real(folder, *args, **options)

    monkeypatch.setattr(lineage, "set_aside_late", fail_once)
    monkeypatch.setattr(choosing, "RETRY_DELAYS_S", (0.0,))
    restorer = Restorer(
        CheckpointConfig(),
        folder=ended_run / "checkpoints",
        run_dir=ended_run,
        control=ControlGroup(None),
        context=RunContext(),
        check_lease=lambda: None,
    )
    restorer._prepare_folder()
    assert len(listings) == 2


def test_undo_finds_steps_that_lookups_miss(ended_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rollback.roll_back(ended_run, 4, progress=lambda *_: None)
    with monkeypatch.context() as patched:  # as a client of NFS that remembers that a name was missing
        patched.setattr(Path, "exists", lambda path: "rolledback" not in path.name)
        undone = rollback.undo(ended_run)
    assert undone.newest_step == 12
    assert paths.committed_steps(ended_run / "checkpoints") == [12, 8, 4]


@pytest.mark.parametrize(
    ("error", "is_told"),
    [
        (OSError(errno.EPERM, "no", "runs/x/stop.request"), True),
        (OSError(errno.ENOENT, "no", "runs/x/checkpoints/step_00000004"), True),
        (OSError(errno.EPERM, "no", "runs/xy/run.json"), False),
        (OSError(errno.EIO, "no"), True),
        (OSError(errno.ECONNREFUSED, "no"), False),
        (ValueError("no"), False),
    ],
)
def test_storage_error_of_the_runs_files_is_told(error: Exception, is_told: bool) -> None:
    told = storage_error(error, [Path("runs/x")])
    assert (told is not None) is is_told
    if told is not None:
        assert told.exit_status == 1
        assert str(told) == f"{error}. Check the file system, then start the same command again"
