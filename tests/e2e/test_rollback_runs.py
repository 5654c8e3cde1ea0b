"""Rollback, fork and the lease on real training runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from support.patch_target import patch_target
from support.runs import Launcher, Run, make_run

pytest_plugins = ["support.run_fixtures"]

PUBLISH = patch_target("kempnerforge.fsio:publish")


def kempnerforge(*arguments: object) -> str:
    code = "from kempnerforge.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def manifest_of(run: Run, step: int) -> dict[str, Any]:
    return json.loads((run.step_folder(step) / "manifest.json").read_text())


def test_rollback_run_resumes_in_new_timeline(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, corpus, **{"metrics.enable_wandb": True})
    launcher.finish(run)
    before = run.counting()
    printed = kempnerforge("ckpt", "rollback", run.folder, 4)
    assert "--undo" in printed
    assert run.committed() == [4]
    launcher.finish(run)
    assert run.committed() == [12, 8, 4]
    assert run.names() >= {"rolledback.step_00000008.1", "rolledback.step_00000012.1"}
    receipt = run.receipts()[-1]
    assert (receipt["attempt"], receipt["step"], receipt["lost_steps"]) == (3, 4, 0)
    assert receipt["bitwise"]
    assert run.counting() == before, "the same config continues with the same bits"
    assert [manifest_of(run, step)["attempt"] for step in (4, 8, 12)] == [1, 3, 3]
    assert [manifest_of(run, step)["parent_step"] for step in (4, 8, 12)] == [None, 4, 8]
    record = run.record
    assert record["wandb_id"] == f"{record['run_id']}-rollback2"
    fragments = [path.name for path in sorted((run.folder / "wandb").glob("offline-run-*"))]
    assert [name.split("-", 3)[3] for name in fragments] == [record["run_id"], record["wandb_id"]]
    launcher.finish(run, "--train.max_steps=14", "--metrics.enable_wandb=false")
    assert run.committed()[0] == 14, "a further start stays in the new timeline"
    assert run.receipts()[-1]["step"] == 12


def test_rollback_then_saves_and_kill_resumes_new_timeline(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus, **{"train.max_steps": 16, "checkpoint.keep_last_n": 4})
    launcher.finish(run)
    whole = run.counting()
    kempnerforge("ckpt", "rollback", run.folder, 4)
    killed = ("kill_at_call", {"target": PUBLISH, "call": 2, "after": True})
    ended = launcher.run(run, faults=[killed])
    assert ended.statuses == [-signal.SIGKILL]
    assert run.committed() == [12, 8, 4], "older steps of the old timeline are not back"
    launcher.finish(run)
    assert run.receipts()[-1]["step"] == 12
    assert [manifest_of(run, step)["attempt"] for step in (4, 8, 12, 16)] == [1, 3, 3, 4]
    assert run.counting() == whole


def test_fork_run_repeats_parent(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    # The global batch is left open, and the parent fixed it: the fork must not choose it anew.
    parent = make_run(tmp_path / "a", corpus, **{"train.global_batch_size": None, "train.batch_size": 4})
    launcher.finish(parent)
    fork = Run(folder=tmp_path / "new", checkpoints=tmp_path / "new" / "checkpoints", base=parent.base)
    fork.config = parent.config
    kempnerforge("ckpt", "fork", parent.step_folder(8), fork.folder, "--link")
    launcher.finish(fork, f"--run.dir={fork.folder}", "--train.batch_size=2")
    assert fork.receipts()[0]["step"] == 8
    assert fork.committed() == [12, 8]
    assert fork.record["parent"]["step"] == 8
    assert fork.record["global_batch_size"] == 4
    mine, theirs = fork.counting(), parent.counting()
    assert [mine[step]["data/digest"] for step in range(9, 13)] == [
        theirs[step]["data/digest"] for step in range(9, 13)
    ]
    assert parent.committed() == [12, 8, 4]


def test_lease_second_start_on_live_run_is_refused(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, corpus, **{"train.max_steps": 100_000, "eval.interval": 0})
    first = launcher.start(run, ranks=2)
    deadline = time.monotonic() + 60
    while not run.committed():
        assert time.monotonic() < deadline, first.output()
        time.sleep(0.05)
    second = launcher.run(run, ranks=2)
    assert second.statuses == [2, 2], second.output
    assert f"is being written by attempt 1, pid {first.pids[0]} on " in second.outputs[0]
    assert "Traceback" not in second.output
    assert run.record["attempt"] == 1, "a refused start counts no attempt"
    first.signal(signal.SIGTERM)
    assert first.wait().statuses == [75, 75]
    newest = run.committed()[0]
    third = launcher.run(run, f"--train.max_steps={newest + 1}")
    assert third.statuses == [0], third.output
    assert "watching" not in third.output, "the lease was given back"
    assert run.receipts()[-1]["step"] == newest
