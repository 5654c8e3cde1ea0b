"""The loop in the README, run as it stands there: killed, resumed, and every bit compared."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.dtypes import DTYPES
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors

pytestmark = pytest.mark.smoke

README = Path(__file__).parents[2] / "README.md"
ADVANCE = "        state.advance()\n"
KILL = """        if state.step == 57:
            import os, time
            while not any(Path("runs/own/checkpoints").glob("step_*")): time.sleep(0.01)
            os.kill(os.getpid(), 9)
"""


def run_loop(folder: Path, *, killed: bool = False) -> subprocess.CompletedProcess[str]:
    section = README.read_text().partition("## Your own loop")[2]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    assert code.count(ADVANCE) == 1
    if killed:
        code = code.replace(ADVANCE, ADVANCE + KILL)
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


def everything(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """All tensors and all other leaves of the last step."""
    reader = SafetensorsReader(folder / "runs/own/checkpoints" / paths.step_name(100))
    # Python and NumPy have other random numbers in every process: the loop seeds those of torch alone.
    names = [name for name in reader.index if not name.startswith("rng.")]
    heads = {name: reader.index.head(name) for name in names}
    tensors = {name: torch.empty(shape, dtype=DTYPES[dtype]) for name, (dtype, shape) in heads.items()}
    load_tensors(tensors, reader)
    return tensors, reader.raw_objects


def test_readme_loop_resumes_bitwise(tmp_path: Path) -> None:
    whole = run_loop(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert "fresh start at step 0" in whole.stderr
    assert run_loop(tmp_path / "parts", killed=True).returncode == -9
    parts = run_loop(tmp_path / "parts")
    assert parts.returncode == 0, parts.stderr
    assert re.search(r"resumed from .* at step \d+", parts.stderr)
    assert "restored too: scheduler" in parts.stderr
    tensors, objects = everything(tmp_path / "whole")
    again, other_objects = everything(tmp_path / "parts")
    assert "optimizer.state.weight.exp_avg_sq" in tensors
    assert tensors.keys() == again.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, again[name]), name
    assert objects["extra.scheduler"]["last_epoch"] == 100  # type: ignore[index]
    assert objects == other_objects
