"""``kempnerforge ckpt`` in a process of its own, and beside a run that saves and prunes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.ckpt_cli import Ckpt
from support.step_maker import write_step

from kempnerforge.checkpoint.format import paths

pytest_plugins = ["support.ckpt_fixtures"]


# Start-up


HEAVY = {"torch", "numpy", "wandb", "tokenizers", "transformers", "safetensors", "rich"}
"""Packages whose import would be most of a command's time."""
STARTS = [["ls"], ["inspect"], ["verify"], ["diff"], ["explain"], ["prune", "--dry-run"], ["du"]]


@pytest.mark.smoke
@pytest.mark.parametrize("command", STARTS)
def test_ckpt_commands_import_no_heavy_module(saved: Path, command: list[str]) -> None:
    path = saved / "checkpoints" / "latest" if command[0] in ("inspect", "diff") else saved
    named = [path, path] if command[0] == "diff" else [path]
    code = (
        "import sys\nfrom kempnerforge.cli.app import main\n"
        f"sys.argv = {['kempnerforge', 'ckpt', *command, *map(str, named)]!r}\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"heavy = {HEAVY!r} & sys.modules.keys()\nassert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


# Beside a run that saves and prunes

WRITER = """
import sys
import time
from pathlib import Path
sys.path[:0] = [{tests!r}]
from support.step_maker import write_step
from kempnerforge.checkpoint.retention.policy import KeepPolicy
from kempnerforge.checkpoint.retention.pruner import Retention
from kempnerforge.config.schema import CheckpointConfig

folder, scratch = Path({folder!r}), Path({scratch!r})
retention = Retention(folder, KeepPolicy.from_config(CheckpointConfig(keep_last_n=2)))
step = 100
print("ready", flush=True)
while not Path({stop!r}).exists():
    step += 1
    # A command must be able to pin the newest step while it is there, on any machine in the end.
    time.sleep(min(0.02 * (step - 100), 2.0))
    # Made elsewhere and renamed, as a commit does.
    write_step(scratch, step).rename(folder / f"step_{{step:08d}}")
    retention.apply()
print(step, retention.apply())
"""


def test_ckpt_commands_work_while_run_saves_and_prunes(ckpt: Ckpt, tmp_path: Path) -> None:
    folder, stop = tmp_path / "run" / "checkpoints", tmp_path / "stop"
    for step in range(90, 100):
        write_step(folder, step)
    code = WRITER.format(
        tests=str(Path(__file__).parents[1]),
        folder=str(folder),
        scratch=str(tmp_path / "scratch"),
        stop=str(stop),
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        seen, pinned = set(), []
        deadline = time.monotonic() + 120
        while not pinned or len(seen) < 20:  # 10 were there before
            assert time.monotonic() < deadline, f"seen: {sorted(seen)}, pinned: {pinned}"
            for command in ("ls", "explain", "du", "verify", "prune"):
                done = ckpt(command, folder, "--json")
                assert done.status == 0, done
                assert not done.err
                steps = done.json["steps"]
                if command == "ls":
                    assert all(one["state"] == "looks sound" for one in steps), steps
                if command in ("ls", "explain", "du"):
                    seen |= {one["step"] for one in steps}
            done = ckpt("pin", folder, max(paths.committed_steps(folder)), "--json")
            if done.status == 0:
                pinned.append(done.json["step"])
            else:
                assert done.status == 2, done
    finally:
        stop.touch()
        out, _ = writer.communicate(timeout=60)
    assert writer.returncode == 0
    last = int(out.split()[0])
    assert max(seen) > 100, "the writer and the commands did run side by side"
    left = paths.committed_steps(folder)
    assert left == sorted({last, last - 1, *pinned}, reverse=True)
    assert ckpt("verify", folder).status == 0
    assert sorted(os.listdir(folder)) == sorted([*map(paths.step_name, left), "pins"])
