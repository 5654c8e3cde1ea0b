"""Fixtures for the tests of ``kempnerforge ckpt``: ``pytest_plugins = ["support.ckpt_fixtures"]``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.ckpt_cli import CONFIG, LOSSES, Ckpt, Done

from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.format import paths
from kempnerforge.checkpoint.format.manifest import Provenance
from kempnerforge.checkpoint.results import Payload
from kempnerforge.cli import app


@pytest.fixture
def ckpt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ckpt:
    """Run ``kempnerforge ckpt`` in this process."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["kempnerforge", "ckpt", *map(str, arguments)])
        capsys.readouterr()
        status: object = None
        try:
            app.main()
        except SystemExit as ended:
            status = ended.code
        assert isinstance(status, int)
        captured = capsys.readouterr()
        return Done(status, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run's folder with steps 10 to 40. Do not change it."""
    run = tmp_path_factory.mktemp("saved") / "run"
    (run / "checkpoints").mkdir(parents=True)
    checkpointer = AsyncCheckpointer()
    for step, loss in LOSSES.items():
        torch.manual_seed(step)
        tensors = {
            "model.w": torch.randn(64, 32),
            "model.b": torch.ones(32, dtype=torch.bfloat16),
            "optimizer.state.w.exp_avg": torch.randn(64, 32),
            "rng.rank_00000": torch.arange(100, dtype=torch.uint8),
            "extra": torch.zeros(3),
        }
        objects = {
            "step": step,
            "tokens": 0,
            "skipped_steps": 0,
            "skipped_in_a_row": 0,
            "data": {"cursor": {"samples": 4 * step}},
        }
        payload = Payload(tensors, objects)
        checkpointer.save(
            lambda payload=payload: payload,
            run / "checkpoints" / paths.step_name(step),
            provenance=Provenance(
                step=step,
                run_id="abc",
                attempt=2,
                parent_step=step - 10 or None,
                reason="interval",
                layout={"num_ranks": 1},
                versions={"torch": "2.13"},
                metrics={"eval/loss": loss},
            ),
            config_toml=CONFIG,
        )
    (run / "checkpoints" / "latest").symlink_to("step_00000040")
    yield run
    close = getattr(checkpointer, "close", None)
    if close is not None:
        close()


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of ``saved`` that a test may change."""
    shutil.copytree(saved, tmp_path / "run", symlinks=True)
    return tmp_path / "run"
