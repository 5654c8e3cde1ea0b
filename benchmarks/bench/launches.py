"""Start KempnerForge and the bare loop by torchrun, as a user does, with the same model and batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.pairs import Measured, alternate
from kempnerforge.config.schema import JobConfig, ModelConfig
from kempnerforge.data.loader import BatchLoader
from kempnerforge.data.tokens import open_dataset
from kempnerforge.goodput.event_log import read_events
from kempnerforge.telemetry.jsonl import read_rows

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Task:
    """The job that both arms train, in its own folder."""

    folder: Path
    model: ModelConfig
    ranks: int
    batch_size: int
    """Sequences per rank."""
    seq_len: int
    steps: int
    """Number of steps with batches."""
    mixed_precision: str = "fp32"
    compile_model: bool = False

    @property
    def tolerance(self) -> float:
        """Relative tolerance of losses, which the arms sum in different orders."""
        return 1e-5 if self.mixed_precision == "fp32" else 2e-2

    def write(self) -> None:
        """Write the tokens, the batches that KempnerForge's loader makes of them, and the config."""
        data = self.folder / "tokens"
        data.mkdir()
        size = self.ranks * self.batch_size
        count = max(2 * self.steps * size, 64) * self.seq_len + 1
        tokens = np.random.default_rng(0).integers(self.model.vocab_size, size=count, dtype=np.uint16)
        np.save(data / "train_0.npy", tokens)
        samples = open_dataset(data, vocab_size=self.model.vocab_size).split("train", self.seq_len)
        job = self.job()
        with BatchLoader(
            samples, seed=job.train.seed, global_batch_size=size, batch_size=size, prefetch_batches=0
        ) as loader:
            drawn: list[Any] = [next(loader)[0] for _ in range(self.steps)]
        whole = [np.concatenate([b.inputs_ABT[0], b.targets_ABT[0][:, -1:]], axis=1) for b in drawn]
        np.save(self.folder / "batches.npy", np.stack(whole))
        (self.folder / "job.toml").write_text(job.to_toml())

    def job(self) -> JobConfig:
        """Return KempnerForge's config: the defaults, with saves configured but none due."""
        return JobConfig.model_validate(
            {
                "run": {"name": "bench"},
                "model": self.model.model_dump(mode="json"),
                "data": {"dataset_path": str(self.folder / "tokens")},
                "train": {
                    "global_batch_size": self.ranks * self.batch_size,
                    "batch_size": self.batch_size,
                    "seq_len": self.seq_len,
                    "max_steps": self.steps,
                    "mixed_precision": self.mixed_precision,
                    "compile_model": self.compile_model,
                },
                "scheduler": {"name": "constant", "warmup_steps": 0},
                "checkpoint": {
                    "interval": 0,
                    "interval_minutes": 10_000.0,
                    "save_last": False,
                    "async_mode": "async",
                },
            }
        )

    def launch(self, *command: str) -> float:
        """Run ``command`` under torchrun to its end. Return its start time in seconds since the epoch."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        began = time.time()
        done = subprocess.run(
            [*torchrun, "--nproc-per-node", str(self.ranks), *command],
            env={"OMP_NUM_THREADS": "1", **os.environ},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        return began

    def train(self, run: Path, *overrides: str) -> Ours:
        """Run ``scripts/train.py`` once, with ``run`` as the run's folder."""
        config = ("--config", str(self.folder / "job.toml"), f"--run.dir={run}")
        began = self.launch(str(HERE.parents[1] / "scripts/train.py"), *config, *overrides)
        events = read_events(run)
        attempt = events[-1]["attempt"]
        rows = [row for row in read_rows(run / "metrics.jsonl").rows if row["attempt"] == attempt]
        mine = {event["event"]: event for event in events if event["attempt"] == attempt}
        return Ours(began, [row for row in rows if "train/loss" in row], mine["start"], mine["resume"])

    def bare(self, *, start: int = 0, steps: int, load: Path | None = None, save: Path | None = None) -> Bare:
        """Run ``bare_loop.py`` once."""
        began = self.launch(*self.bare_command(start=start, steps=steps, load=load, save=save))
        return Bare(began, **json.loads((self.folder / "bare.json").read_text()))

    def bare_command(
        self,
        *,
        start: int,
        steps: int,
        load: Path | None = None,
        save: Path | None = None,
        log: Path | None = None,
    ) -> list[str]:
        """Return ``bare_loop.py`` and its argument. It appends a row for each step to ``log``."""
        job = self.job()
        spec = {
            "start": start,
            "steps": steps,
            "load": load and str(load),
            "save": save and str(save),
            "log": log and str(log),
            "batches": str(self.folder / "batches.npy"),
            "out": str(self.folder / "bare.json"),
            **job.optimizer.model_dump(mode="json", include={"lr", "weight_decay", "betas", "eps"}),
            **job.train.model_dump(
                mode="json", include={"seed", "grad_clip_norm", "mixed_precision", "compile_model"}
            ),
            "model": job.model.model_dump(mode="json"),
        }
        (self.folder / "bare_spec.json").write_text(json.dumps(spec))
        return [str(HERE / "bare_loop.py"), str(self.folder / "bare_spec.json")]


@dataclass(frozen=True)
class Ours:
    """The records of an attempt of KempnerForge."""

    began: float
    rows: list[dict[str, Any]]
    """Training rows of metrics.jsonl."""
    start: dict[str, Any]
    """The start event of the ledger."""
    resume: dict[str, Any]
    """The resume event of the ledger."""

    @property
    def losses(self) -> list[float]:
        """The losses of all steps."""
        return [row["train/loss"] for row in self.rows]

    @property
    def step_ended(self) -> list[float]:
        """When each step was logged."""
        return [row["time"] for row in self.rows]


@dataclass(frozen=True)
class Bare:
    """The output of the bare loop."""

    began: float
    losses: list[float]
    step_ended: list[float]
    ended: dict[str, float]
    """Each part of the start -> when it ended, in seconds since the epoch."""


def largest_difference(ours: Sequence[float], bare: Sequence[float]) -> float:
    """Return the largest relative difference of losses. Raises ValueError for different step counts."""
    return max(abs(loss - other) / abs(other) for loss, other in zip(ours, bare, strict=True))


def compare_starts(
    arms: tuple[Callable[[], tuple[Ours, Measured]], Callable[[], tuple[Bare, Measured]]],
    number: int,
    *,
    warmups: int,
    tolerance: float,
) -> tuple[dict[str, list[Measured]], list[float], float]:
    """Start KempnerForge and the bare loop in turn.

    Return the measurements, the losses of the last start, and the largest difference of losses
    between the arms. End the benchmark if this is more than ``tolerance``, because then the bare
    loop does not do the same work.
    """
    losses: dict[str, list[float]] = {}

    def measure(name: str, start: Callable[[], tuple[Ours | Bare, Measured]]) -> Measured:
        done, measured = start()
        losses[name] = done.losses
        return measured

    named = {"ours": lambda _pair: measure("ours", arms[0]), "bare": lambda _pair: measure("bare", arms[1])}
    measurements = alternate(named, number, warmups=warmups)
    difference = largest_difference(losses["ours"], losses["bare"])
    if not difference <= tolerance:  # also for NaN
        sys.exit(f"the losses differ by {difference:.2g}, relative: the bare loop does other work")
    return measurements, losses["ours"], difference
