"""run.json, attempts, and the check that all ranks see one folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch.distributed as dist
from support.ckpt_cli import Ckpt
from support.clock import FakeClock
from support.ranks import run_ranks
from support.step_maker import write_step

from kempnerforge.checkpoint.run import attempt_start, lease
from kempnerforge.checkpoint.run.attempt_start import open_run
from kempnerforge.checkpoint.run.metadata import RunRecord
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.errors import LeaseHeldError, RunFolderError
from kempnerforge.train.run_dir import record_exit

pytest_plugins = ["support.ckpt_fixtures"]
pytestmark = pytest.mark.smoke

ALONE = ControlGroup(None)


def begin(folder: Path, size: int) -> RunRecord:
    """One attempt that ends in order."""
    record, lease = open_run(folder, ALONE, first_global_batch_size=size)
    assert lease is not None
    lease.release()
    return record


def test_run_folder_next_attempt_keeps_identity(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    first = begin(folder, 12)
    record_exit(folder, status=75, reason="stopped by SIGTERM", step=40)
    second = begin(folder, 99)
    assert (first.attempt, second.attempt) == (1, 2)
    assert (first.run_id, first.timeline_id) == (second.run_id, second.timeline_id)
    assert second.global_batch_size == 12
    assert second.last_exit is not None
    assert (second.last_exit["status"], second.last_exit["step"], second.last_exit["attempt"]) == (75, 40, 1)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "lease.2.json", "run.json"]
    other = begin(tmp_path / "runs" / "b", 12)
    assert other.run_id != first.run_id


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run_id": 1}', '{"unknown": 1}'])
def test_run_folder_broken_run_file_reported_and_kept(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"run\.json cannot be read"):
        open_run(tmp_path, ALONE, first_global_batch_size=1)
    assert (tmp_path / "run.json").read_text() == content


def test_run_folder_checkpoints_without_run_file_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(RunFolderError, match="so their run is unknown"):
        open_run(tmp_path, ALONE, first_global_batch_size=1)


def test_run_folder_lost_run_file_names_fork_that_works(tmp_path: Path, ckpt: Ckpt) -> None:
    for step in (4, 12, 8):
        write_step(tmp_path / "lost" / "checkpoints", step)
    with pytest.raises(RunFolderError) as caught:
        open_run(tmp_path / "lost", ALONE, first_global_batch_size=1)
    newest = tmp_path / "lost" / "checkpoints" / "step_00000012"
    assert f"(kempnerforge ckpt fork {newest} NEW_RUN)" in str(caught.value)
    assert ckpt("fork", newest, tmp_path / "found", "--json").json["step"] == 12


def test_run_folder_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"run\.dir: .*cannot be used"):
        open_run(tmp_path / "file" / "run", ALONE, first_global_batch_size=1)


def test_run_folder_with_another_nonce_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClock().replace_in(monkeypatch, attempt_start)
    (tmp_path / ".nonce-x").touch()
    error = attempt_start._missing_nonce(tmp_path, "x", attempt_start.OpenOptions())
    assert "is not the folder that rank 0 sees" in str(error)


def open_on_two_nodes(base: str) -> str:
    # Two nodes whose disks are their own: the same relative path is another folder on each.
    node = Path(base) / f"node{dist.get_rank()}"
    node.mkdir()
    os.chdir(node)
    attempt_start.time = FakeClock()  # type: ignore[assignment]
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    with pytest.raises(RunFolderError) as caught:
        open_run(Path("runs/x"), ControlGroup(group), first_global_batch_size=1)
    return str(caught.value)


def test_run_folder_node_local_refused_on_all_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(open_on_two_nodes, 2, str(tmp_path))
    assert first == second
    assert "must be on a file system that all nodes share" in first
    assert "node1/runs/x" in first
    assert json.loads((tmp_path / "node0/runs/x/run.json").read_text())["attempt"] == 1


def pids_in_refusal(folder: str) -> tuple[int, str]:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    control = ControlGroup(group)
    _, held = open_run(Path(folder), control, first_global_batch_size=1)
    text = ""
    if held is not None:
        with pytest.raises(LeaseHeldError) as caught:
            lease.acquire(Path(folder))
        text = str(caught.value)
        held.release()
    control.agree([0])
    return os.getpid(), text


def test_run_folder_refusal_names_pids_of_all_ranks(tmp_path: Path) -> None:
    """torchrun may be killed alone: its ranks go on, and all of them are to be stopped."""
    (first, told), (second, _) = run_ranks(pids_in_refusal, 2, str(tmp_path))
    assert f"(kill {first} {second} (on " in told
