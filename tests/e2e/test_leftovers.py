"""What a kill leaves half done, the next start finishes or removes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from support.patch_target import patch_target
from support.runs import Fault, Launcher, Run, make_run

pytest_plugins = ["support.run_fixtures"]

PUBLISH = patch_target("kempnerforge.fsio:publish")
MISSING_NONCE = patch_target("kempnerforge.checkpoint.run.attempt_start:_missing_nonce")
REPLACE = patch_target("os:replace")
SYMLINK = patch_target("os:symlink")

SETTINGS = {"train.max_steps": 4, "checkpoint.interval": 2, "checkpoint.keep_last_n": 1, "eval.interval": 0}


def killed_at(target: str, call: int = 1, *, after: bool = False) -> list[Fault]:
    return [("kill_at_call", {"target": target, "call": call, "after": after})]


def names_in(run: Run) -> set[str]:
    """What is in a run, but for the insides of checkpoints and the lease, whose name has the attempt."""
    paths = [*run.folder.iterdir(), *run.checkpoints.iterdir()]
    return {str(path.relative_to(run.folder)) for path in paths if not path.name.startswith("lease.")}


@pytest.mark.smoke
def test_cleanup_after_last_commit_done_by_next_start(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus, **SETTINGS)
    ended = launcher.run(run, faults=killed_at(PUBLISH, 2, after=True))
    assert ended.statuses == [-signal.SIGKILL], ended.output
    assert run.sound() == [4, 2]
    launcher.finish(run)
    assert run.receipts()[-1]["step"] == 4
    assert run.sound() == [4]
    assert os.readlink(run.checkpoints / "latest") == "step_00000004"


@pytest.mark.parametrize(
    "faults",
    [
        killed_at(REPLACE),
        killed_at(MISSING_NONCE),
        killed_at(SYMLINK, after=True),
    ],
    ids=["while run.json is replaced", "while ranks compare what they see", "while latest is pointed"],
)
def test_kill_leaves_no_permanent_file(
    launcher: Launcher, corpus: Path, tmp_path: Path, faults: list[Fault]
) -> None:
    whole = make_run(tmp_path / "whole", corpus, **SETTINGS)
    launcher.finish(whole)
    run = make_run(tmp_path / "killed", corpus, **SETTINGS)
    ended = launcher.run(run, faults=faults)
    assert ended.statuses == [-signal.SIGKILL], ended.output
    launcher.finish(run)
    assert names_in(run) == names_in(whole)
