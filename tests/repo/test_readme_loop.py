"""The loop in the README, run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kempnerforge.checkpoint import layout
from kempnerforge.checkpoint.storage_reader import SafetensorsReader, load_tensors

pytestmark = pytest.mark.smoke

README = Path(__file__).parents[2] / "README.md"


def run_loop(folder: Path, steps: int) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)
    assert "state.step < 100" in code
    seeded = "import torch\ntorch.manual_seed(5)\n" + code.replace(
        "state.step < 100", f"state.step < {steps}"
    )
    folder.mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-c", seeded], cwd=folder, check=True, timeout=120)


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    found = {
        "model.weight": torch.zeros(1, 8),
        "model.bias": torch.zeros(1),
        "optimizer.state.weight.exp_avg": torch.zeros(1, 8),
        "optimizer.state.weight.step": torch.zeros(()),
    }
    load_tensors(found, SafetensorsReader(folder / "runs/own/checkpoints" / layout.step_name(step)))
    return found


def test_readme_loop_resumes_bitwise(tmp_path: Path) -> None:
    run_loop(tmp_path / "whole", 100)
    steps = layout.committed_steps(tmp_path / "whole/runs/own/checkpoints")
    assert steps[0] == 100
    assert len(steps) >= 2
    run_loop(tmp_path / "parts", 37)
    run_loop(tmp_path / "parts", 100)
    whole, parts = weights(tmp_path / "whole", 100), weights(tmp_path / "parts", 100)
    assert float(whole["optimizer.state.weight.step"]) == 100
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
