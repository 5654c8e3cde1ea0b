"""Export and import in processes of their own: killed, and with their memory measured."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from support.patch_target import patch_target
from support.step_maker import write_step
from support.weight_cases import make_model, process, save

from kempnerforge.config.schema import ModelConfig
from kempnerforge.config.toml_text import render
from kempnerforge.model.hf import tensor_map

pytest_plugins = ["support.ckpt_fixtures"]

PUBLISH = patch_target("kempnerforge.fsio:publish")


def test_export_killed_leaves_nothing_under_final_name(tmp_path: Path) -> None:
    step = save(tmp_path, make_model())
    # All is written; only the rename is left.
    module, name = PUBLISH.split(":")
    wait = f"import time, {module} as owner\nowner.{name} = lambda *_: time.sleep(600)"
    code = f"{wait}\nfrom kempnerforge.cli.app import main\nmain()"
    started = subprocess.Popen(
        [sys.executable, "-c", code, "ckpt", "export", str(step), "--out", str(tmp_path / "hf")]
    )
    hidden = tmp_path / ".hf.export" / "config.json"
    deadline = time.monotonic() + 120
    while not hidden.exists():
        assert time.monotonic() < deadline, "the export writes no config.json"
        assert started.poll() is None, "the export ended early"
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert not (tmp_path / "hf").exists()
    again = process("ckpt", "export", step, "--out", tmp_path / "hf")
    assert again.returncode == 2
    assert "another export is creating it, or was killed" in again.stderr
    shutil.rmtree(hidden.parent)
    assert process("ckpt", "export", step, "--out", tmp_path / "hf").returncode == 0


# Memory

PEAK = """
import atexit
def report():
    import re, sys
    print("peak", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
atexit.register(report)
"""


def peak_mb(*arguments: object) -> float:
    done = process(*arguments, code=PEAK)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split("peak ")[1]) / 1000


def test_export_and_import_memory_independent_of_model(tmp_path: Path) -> None:
    """Out and in: a model of 200 MB, its largest tensor 61 MB, takes hardly more than a tiny one."""
    sizes = {"dim": 512, "n_layers": 2, "n_heads": 8, "ffn_hidden_dim": 6000, "vocab_size": 30000}

    def zeros(name: str, changes: dict[str, Any]) -> Path:
        config = ModelConfig.model_validate(changes)
        state = {f"model.{one.name}": np.zeros(one.shape, np.float32) for one in tensor_map(config)}
        boxes = {key: [((0,) * array.ndim, array.shape)] for key, array in state.items()}
        text = render({"model": config.model_dump(mode="json")})
        return write_step(tmp_path / name, 7, state=state, boxes=boxes, config=text)

    small, large = zeros("small", {"dim": 32, "n_heads": 2}), zeros("large", sizes)
    model_mb = sum(path.stat().st_size for path in large.iterdir()) / 1e6
    assert model_mb > 190
    for verb in (["ckpt", "export"], ["import", "hf"]):
        peaks = []
        for step in (small, large):
            source = step if verb[1] == "export" else tmp_path / f"{step.parent.name}.export"
            peaks.append(peak_mb(*verb, source, "--out", tmp_path / f"{step.parent.name}.{verb[1]}"))
        assert peaks[1] - peaks[0] < 50, (verb, peaks, model_mb)
