"""Runs with a loss of hidden states and a z-loss: what they log, and that they resume bitwise."""

from __future__ import annotations

from pathlib import Path

from support.patch_target import patch_target
from support.runs import Launcher, make_run

pytest_plugins = ["support.run_fixtures"]

UPDATE = patch_target("kempnerforge.train.step:LocalStep.update")
CHUNKED = {"train.loss": "chunked_cross_entropy", "train.loss_args.chunk_tokens": 7}


def test_chunked_loss_killed_and_resumed_is_bitwise_equal(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    settings = {**CHUNKED, "train.z_loss": 0.01, "checkpoint.interval": 2, "eval.interval": 3}
    undisturbed = make_run(tmp_path / "undisturbed", corpus, **settings)
    launcher.finish(undisturbed, ranks=2)
    killed = make_run(tmp_path / "killed", corpus, **settings)
    ended = launcher.run(killed, ranks=2, faults=[("kill_at_call", {"target": UPDATE, "call": 7})])
    assert -9 in ended.statuses, ended.output
    launcher.finish(killed, ranks=2)
    assert 0 < killed.receipts()[-1]["step"] < 7
    assert killed.counting() == undisturbed.counting()
    z_losses = [row["train/z_loss"] for row in killed.rows() if "train/loss" in row]
    assert all(value > 0 for value in z_losses)


def test_z_loss_off_logs_no_row(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, corpus)
    launcher.finish(run)
    assert not any("train/z_loss" in row for row in run.rows())
