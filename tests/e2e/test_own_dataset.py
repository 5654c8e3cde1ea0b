"""Runs on a dataset of the user's: the same bits after a kill, explained changes, one-line errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.patch_target import patch_target
from support.runs import Ended, Launcher, Run, make_run

pytest_plugins = ["support.run_fixtures"]

WAIT_S = 200.0
UPDATE = patch_target("kempnerforge.train.step:LocalStep.update")
SOURCE = """
import multiprocessing
import subprocess
import time
from pathlib import Path

import numpy as np

class Walks:
    def __init__(self, count, step=1, bad=None, kind="tokens"):
        self.count, self.step, self.bad, self.kind = count, step, bad, kind
        if kind == "pool":
            self.pool = multiprocessing.Pool(1)
    def __len__(self):
        return self.count
    def __getitem__(self, i):
        if i == self.bad:
            raise ValueError("no such\\nwalk")
        if self.kind == "ends children":
            child = multiprocessing.Process(target=time.sleep, args=(1000,))
            child.start()
            child.terminate()
            child.join()
            program = subprocess.Popen(["sleep", "1000"])
            program.terminate()
            program.wait()
        start = np.random.default_rng(int(i)).integers(200)
        tokens = (start + self.step * np.arange(33)) % 256
        return {"tokens": tokens} if self.kind == "dict" else tokens
"""
DATA = {"data.text": None, "data.dataset": "own_walks:Walks", "data.args.count": 40}


def walks_run(base: Path, corpus: Path, **settings: Any) -> Run:
    run = make_run(base, corpus, **{**DATA, **settings})
    (base / "own_walks.py").write_text(SOURCE)
    return run


def refusal(ended: Ended, status: int = 2) -> str:
    assert set(ended.statuses) == {status}, ended.output
    assert "Traceback" not in ended.output
    return ended.output


def test_own_dataset_resumes_bitwise_and_explains_changes(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    whole = walks_run(tmp_path / "whole", corpus)
    launcher.finish(whole, ranks=2)
    run = walks_run(tmp_path / "killed", corpus)
    kill = ("kill_at_call", {"target": UPDATE, "call": 7, "rank": None})
    assert set(launcher.run(run, ranks=2, faults=[kill]).statuses) == {-9}
    assert 'data: 40 samples of 32 tokens in "own_walks:Walks", 4 of them held out' in whole_output(run)

    changed = refusal(launcher.run(run, "--data.args.step=2", ranks=2))
    assert "data.args: was {'count': 40}, is {'count': 40, 'step': 2}" in changed
    assert "--data.allow_changed=true" in changed

    module = run.base / "own_walks.py"
    module.write_text(f"{SOURCE}\n# the code alone is no other data\n")
    launcher.finish(run, ranks=2)
    assert run.counting() == whole.counting()


def test_own_dataset_workers_change_no_bits(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    whole = walks_run(tmp_path / "whole", corpus)
    launcher.finish(whole, ranks=2)
    run = walks_run(tmp_path / "workers", corpus, **{"data.num_workers": 2})
    kill = ("kill_at_call", {"target": UPDATE, "call": 7, "rank": None})
    assert set(launcher.run(run, ranks=2, faults=[kill]).statuses) == {-9}
    launcher.finish(run, "--data.num_workers=1", ranks=2)
    assert run.counting() == whole.counting()


def test_train_files_named_like_modules_not_imported(corpus: Path, tmp_path: Path) -> None:
    """The rank, its workers and the process that writes import Python's own ``random``, not the user's."""
    run = walks_run(tmp_path, corpus, **{"data.num_workers": 1, "train.max_steps": 4})
    for name in ("random", "profile", "socket"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the user is imported')")
    command = [sys.executable, "-P", "-m", "kempnerforge", "train", str(run.config)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    assert run.sound() == [4]


def whole_output(run: Run) -> str:
    return "".join(path.read_text() for path in sorted(run.base.glob("start_*.log")))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["pool", "ends children"])
def test_own_dataset_with_children_finishes(
    launcher: Launcher, corpus: Path, tmp_path: Path, kind: str, workers: int
) -> None:
    """A pool is never closed. The SIGTERM with which a dataset ends its children is no stop of the run."""
    settings = {"data.args.kind": kind, "data.num_workers": workers, "train.max_steps": 4}
    run = walks_run(tmp_path, corpus, **settings)
    assert "SIGTERM" not in launcher.finish(run).output
    assert run.sound() == [4]


@pytest.mark.smoke
def test_own_dataset_that_raises_is_named_on_one_line(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = walks_run(tmp_path, corpus, **{"data.args.bad": 31, "checkpoint.interval": 1, "eval.interval": 0})
    for _ in range(3):
        ended = launcher.run(run, ranks=2)
        assert 1 in ended.statuses
        [line] = [line for line in ended.output.splitlines() if "sample 31" in line]
        assert 'data.dataset "own_walks:Walks": sample 31 raised ValueError: no such walk (' in line
        assert line.startswith("error")
        assert "own_walks.py:18)" in line
    # It failed twice from one step, which is never suspected for it.
    assert run.sound()
    assert not [name for name in run.names() if name.startswith("suspect")]


def test_own_dataset_that_cannot_be_used_is_refused(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = walks_run(tmp_path, corpus)
    assert "train.seq_len = 16 needs 17 tokens" in refusal(launcher.run(run, "--train.seq_len=16", ranks=2))
    assert "own_walks:Walks has no samples" in refusal(launcher.run(run, "--data.args.count=0"))
    assert "samples of own_walks:Walks are dicts, and llama has no loss(batch)" in refusal(
        launcher.run(run, "--data.args.kind=dict", ranks=2)
    )
    assert not run.checkpoints.exists() or not run.committed()
