"""The two arms of the goodput benchmark: their commands, their files, and their costs without kills."""

from __future__ import annotations

import argparse
import filecmp
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import goodput_arithmetic as arithmetic
from bench.goodput_arithmetic import Cost
from bench.kills import Attempt, BenchError, Job, run_to_end
from kempnerforge.checkpoint.format.paths import committed_steps, step_name
from kempnerforge.data.prepare import prepare
from kempnerforge.data.tokenizer import load_tokenizer
from kempnerforge.goodput.accounting import account
from kempnerforge.goodput.history import read_history

REPO = Path(__file__).resolve().parents[2]
METADATA = ".metadata"

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "pairs": 1,
        "first_seed": 329,
        "ranks": 2,
        "dim": 32,
        "n_layers": 1,
        "seq_len": 16,
        "steps": 120,
        "mtti_s": 2.0,
        "max_kills": 2,
        "delay_s": 0.1,
        "interval": "10",
        "reference_interval": "10",
        "launcher": "ranks",
        "deterministic": "false",
    },
    "cpu": {
        "pairs": 5,
        "first_seed": 1,
        "ranks": 2,
        "dim": 384,
        "n_layers": 6,
        "seq_len": 32,
        "steps": 400,
        "mtti_s": 25.0,
        "max_kills": 0,
        "delay_s": 1.0,
        "interval": "auto",
        "reference_interval": "daly",
        "launcher": "torchrun",
        "deterministic": "false",
    },
    "gpu": {
        "pairs": 5,
        "first_seed": 1,
        "ranks": 1,
        "dim": 2048,
        "n_layers": 16,
        "seq_len": 512,
        "steps": 800,
        "mtti_s": 45.0,
        "max_kills": 0,
        "delay_s": 1.0,
        "interval": "auto",
        "reference_interval": "daly",
        "launcher": "torchrun",
        "deterministic": "true",
    },
}
PROBE_SAVES = 8
"""Number of saves of the undisturbed run, without the one at its end."""

CONFIG = """\
[model]
dim = {dim}
n_layers = {n_layers}
n_heads = {n_heads}
vocab_size = 512
max_seq_len = {seq_len}
[data]
dataset_path = "{tokens}"
[train]
global_batch_size = {global_batch_size}
batch_size = 1
seq_len = {seq_len}
max_steps = {steps}
mixed_precision = "fp32"
deterministic = {deterministic}
[optimizer]
lr = 3e-4
[scheduler]
warmup_steps = 5
[eval]
interval = 0
[metrics]
enable_wandb = false
log_interval = 50
[checkpoint]
async_mode = "async_with_pinned_mem"
keep_last_n = 2
"""


def prepare_inputs(folder: Path, given: argparse.Namespace) -> Path:
    """Write the tokens and the config of both arms. Return the path of the config."""
    text = [str(path) for path in sorted(Path(argparse.__file__).parent.glob("a*.py"))]
    prepare(text, folder / "tokens", load_tokenizer("bytes"))
    config = folder / "bench.toml"
    values = {**vars(given), "tokens": folder / "tokens", "n_heads": max(1, given.dim // 64)}
    config.write_text(CONFIG.format(**values, global_batch_size=given.ranks))
    return config


@dataclass
class Arm:
    """One way to train, and its costs in a run without kills (the undisturbed run)."""

    name: str
    interval: str
    """Steps between saves, ``daly`` (Daly's interval), or ``auto`` (only ours)."""
    undisturbed: Attempt = field(default_factory=lambda: Attempt(0.0, 0))
    cost: Cost = field(default_factory=lambda: Cost(1.0, 0.0, 0.0, 0.0, 0.0))
    campaigns: list[dict[str, Any]] = field(default_factory=list)

    def job(self, folder: Path, given: argparse.Namespace, interval: str) -> Job:
        """Return a run in ``folder`` with a save every ``interval`` steps."""
        config, checkpoints = given.config, folder / "checkpoints"
        if self.name == "ours":
            program = ["scripts/train.py", "--config", str(config), f"--run.dir={folder}"]
            program += [f"--checkpoint.interval={interval}"]
            if interval == "auto":  # it gets the same MTTI as "daly", and may spend as much on saves
                hours = given.mtti_s / 3600
                program += [f"--checkpoint.expected_mtti_hours={hours}", "--checkpoint.max_overhead_pct=50"]
            rows, newest = folder / "metrics.jsonl", lambda: max(committed_steps(checkpoints), default=0)
        else:
            program = ["benchmarks/bench/reference_loop.py", "--config", str(config), "--folder", str(folder)]
            program += ["--steps", str(given.steps), "--interval", interval]
            rows, newest = folder / "rows.jsonl", lambda: newest_of_reference(checkpoints)
        program[0] = str(REPO / program[0])
        log = folder.with_suffix(".log")
        return Job(f"{self.name} in {folder}", program, rows, log, newest, given.ranks, given.launcher)

    def probe(self, folder: Path, given: argparse.Namespace) -> None:
        """Run without kills and measure the costs."""
        job = self.job(folder, given, str(max(1, given.steps // (PROBE_SAVES + 1))))
        (self.undisturbed,) = run_to_end(job, iter(()), delay_s=0.0)
        try:
            self.cost = arithmetic.cost_of(self.undisturbed, blocking_is_lag=self.name != "ours")
        except ValueError as error:
            raise BenchError(f"{job.name}: {error}; use more --steps") from error
        if self.interval == "daly":
            self.interval = str(daly_steps(self.cost, given.mtti_s))

    @property
    def ideal_s(self) -> float:
        """Time that the steps take without kills and saves."""
        return self.cost.step_s * len(self.undisturbed.steps)


def newest_of_reference(checkpoints: Path) -> int:
    """Return the newest step that has a ``.metadata`` file; 0 for none."""
    complete = checkpoints.glob(f"step_*/{METADATA}")
    return max((int(path.parent.name.removeprefix("step_")) for path in complete), default=0)


def daly_steps(cost: Cost, mtti_s: float) -> int:
    """Return the best interval in steps."""
    return max(1, round(arithmetic.best_interval_s(cost, mtti_s) / cost.step_s))


def differing_files(one: Path, other: Path, step: int) -> list[str]:
    """Return shards of ``step`` (weights, moments, random states) whose bytes differ between two runs."""
    first, second = (folder / "checkpoints" / step_name(step) for folder in (one, other))
    names = {path.name for folder in (first, second) for path in folder.glob("shard_*")}
    _, *differ = filecmp.cmpfiles(first, second, sorted(names), shallow=False)
    return sorted(name for part in differ for name in part)


def ledger(folder: Path, wall_s: float) -> dict[str, Any]:
    """Return the figures of ``kempnerforge report`` for the same run.

    They exclude attempts that ended before they opened the folder, and the time after the end.
    """
    body = account(read_history(folder), now=0.0, running=False)
    parts = body["parts_s"]
    return {
        "wall_s": body["wall_s"],
        "unseen_s": wall_s - body["wall_s"],
        "ettr": body["ettr"],
        "lost_steps": body["lost_steps"],
        "restart_and_delay_s": parts["setup"] + parts["idle"],
        "parts_s": parts,
    }
