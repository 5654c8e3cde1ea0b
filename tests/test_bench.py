"""The benchmarks run, and each arm does what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).parent.parent


def run_small(name: str, folder: Path) -> dict[str, Any]:
    """Run a benchmark on two ranks, at a small size, in ``folder``; what it measured."""
    arguments = ["--size-mb", "2", "--pairs", "2", "--steps", "2", "--width", "64", "--json", "out.json"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*command, str(REPO / f"scripts/{name}.py"), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr
    assert "ratio" in ended.stdout
    found = json.loads((folder / "out.json").read_text())
    assert [path.name for path in folder.iterdir()] == ["out.json"], "it cleans up"
    return found


def test_bench_stop_measures_from_the_signal_to_the_commit(tmp_path: Path) -> None:
    found = run_small("bench_stop", tmp_path)
    assert found["size_bytes"] > 1_800_000
    assert [len(found[name]) for name in ("stop_s", "raw_s", "step_s")] == [2, 2, 6]
    assert min(found["stop_s"]) > 0
    assert min(found["raw_s"]) > 0
