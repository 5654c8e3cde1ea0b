"""``kempnerforge eval``: the validation loss of a checkpoint, as training computes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.patch_target import patch_target
from support.runs import Ended, Launcher, Run, copy_run, make_run, write_corpus

from kempnerforge.cli.evaluate import FORCED
from kempnerforge.cli.evaluate import evaluate as evaluate_command
from kempnerforge.cli.step_config import load_for
from kempnerforge.config.schema import ParallelDims
from kempnerforge.errors import ConfigError

pytest_plugins = ["support.run_fixtures"]

LOAD_TENSORS = patch_target("kempnerforge.checkpoint.load.load_step:load_tensors")


@pytest.fixture(scope="module")
def trained(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two ranks whose layout is written out; step 6 has no validation loss."""
    settings: dict[str, Any] = {
        "distributed.dp_shard": 2,
        "train.max_steps": 8,
        "checkpoint.at_steps": [6],
        "checkpoint.keep_last_n": 5,
    }
    run = make_run(tmp_path_factory.mktemp("trained"), corpus, **settings)
    launcher.finish(run, ranks=2)
    return run


def evaluate(
    launcher: Launcher, run: Run, step: int, *overrides: str, ranks: int = 1, faults: Any = ()
) -> Ended:
    command = ["eval", str(run.step_folder(step)), "--json"]
    return launcher.run(run, *overrides, ranks=ranks, command=command, faults=faults)


def result(ended: Ended) -> dict[str, Any]:
    """The JSON object that rank 0 printed; the other ranks say nothing."""
    assert ended.statuses == [0] * len(ended.statuses), ended.output
    assert all(text == "" for text in ended.outputs[1:])
    return json.loads(ended.outputs[0][ended.outputs[0].index("{") :])


def logged(run: Run, step: int) -> float:
    return run.counting()[step]["eval/loss"]


def everything(run: Run) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in run.folder.rglob("*")}


@pytest.mark.smoke
def test_eval_loss_matches_logged_loss_bitwise(launcher: Launcher, trained: Run) -> None:
    before = everything(trained)
    found = result(evaluate(launcher, trained, 4, ranks=2))
    assert repr(found["eval/loss"]) == repr(logged(trained, 4))
    assert (found["step"], found["num_ranks"], found["tokens"]) == (4, 2, 2 * 4 * 32)
    assert found["data_changes"] == []
    assert logged(trained, 4) != logged(trained, 8)
    assert everything(trained) == before, "nothing in the run's folder has changed"


def test_eval_under_torchrun_matches_logged_loss(trained: Run) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "kempnerforge", "eval", str(trained.checkpoints / "latest"), "--json"]
    done = subprocess.run(command, cwd=trained.base, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["eval/loss"] == logged(trained, 8)


def test_eval_other_layout_matches_within_rounding(launcher: Launcher, trained: Run) -> None:
    ended = evaluate(launcher, trained, 8)
    found = result(ended)
    assert found["eval/loss"] == pytest.approx(logged(trained, 8), rel=1e-5)
    assert (found["geometry"]["dp_shard"], found["geometry"]["accumulation_steps"]) == (1, 4)
    assert "the layout of the step, dp_replicate 1 x dp_shard 2 x tp 1 x pp 1, does not fit" in ended.output
    # HSDP on two ranks, and a step that has no loss in the log.
    hybrid = evaluate(
        launcher, trained, 6, "--distributed.dp_shard=1", "--distributed.dp_replicate=2", ranks=2
    )
    assert logged(trained, 8) < result(hybrid)["eval/loss"] < logged(trained, 4)


@pytest.mark.smoke
@pytest.mark.parametrize("dimension", ["tp", "pp"])
def test_eval_tensor_and_pipeline_parallel_match(launcher: Launcher, trained: Run, dimension: str) -> None:
    found = result(evaluate(launcher, trained, 8, f"--distributed.{dimension}=2", ranks=2))
    assert (found["geometry"][dimension], found["geometry"]["dp"]) == (2, 1)
    assert found["eval/loss"] == pytest.approx(logged(trained, 8), rel=1e-5)


def test_eval_overrides_change_data_and_size(launcher: Launcher, trained: Run, tmp_path: Path) -> None:
    small = result(evaluate(launcher, trained, 8, "--eval.num_batches", "1"))
    assert small["tokens"] == 128
    assert small["eval/loss"] != logged(trained, 8)
    other = write_corpus(tmp_path / "other", seed=2)
    ended = evaluate(launcher, trained, 8, f'--data.text=["{other}/*.txt"]')
    found = result(ended)
    assert found["eval/loss"] not in (small["eval/loss"], logged(trained, 8))
    assert any(line.startswith("the tokens themselves (digest): was ") for line in found["data_changes"])


@pytest.mark.smoke
def test_eval_not_finite_loss_is_valid_json(
    monkeypatch: pytest.MonkeyPatch, trained: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    from kempnerforge.train import evaluation

    geometry = ParallelDims(1, 1, 1, 1, 1, global_batch_size=4, accumulation_steps=4)
    diverged = evaluation.Evaluation(8, float("nan"), 256, geometry, 1, "cpu", [], 1.0)
    monkeypatch.setattr(evaluation, "evaluate_step", lambda *_args, **_options: diverged)
    evaluate_command([str(trained.step_folder(8))], as_json=True)
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["eval/loss"] == "NaN"


def test_eval_step_being_read_has_read_lock(launcher: Launcher, trained: Run, tmp_path: Path) -> None:
    """Retention sees that the step is being read."""
    seen = tmp_path / "seen"
    spy = {"folder": str(trained.checkpoints / "holds"), "into": str(seen)}
    reading = ("list_at_call", {"target": LOAD_TENSORS, **spy})
    result(evaluate(launcher, trained, 8, faults=[reading]))
    assert seen.read_text().startswith("step_00000008.")
    assert not (trained.checkpoints / "holds").exists()


def test_eval_damaged_step_fails_and_renames_nothing(
    launcher: Launcher, trained: Run, tmp_path: Path
) -> None:
    run = copy_run(trained, tmp_path / "copy")
    shard = run.step_folder(8) / "shard_00001_of_00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    before = everything(run)
    ended = evaluate(launcher, run, 8, ranks=2)
    assert ended.statuses == [1, 1], ended.output
    assert "is damaged" in ended.outputs[0]
    assert "It was left as it is" in ended.outputs[0]
    assert ended.outputs[1] == ""
    assert everything(run) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.dim=64"], "does not fit this config (21 tensors differ)"),
        (["--mdel.dim=64"], "--mdel.dim: is not a known key; did you mean model.dim?"),
        (["--train.global_batch_size=3"], "train.global_batch_size: 3 does not divide"),
        (["--data.val_fraction=0"], "data.val_fraction"),
    ],
)
def test_eval_invalid_overrides_exit_2(
    launcher: Launcher, trained: Run, arguments: list[str], message: str
) -> None:
    ended = evaluate(launcher, trained, 8, *arguments, ranks=2)
    assert ended.statuses == [2, 2], ended.output
    assert message in ended.outputs[0]
    assert "Traceback" not in ended.output
    assert ended.outputs[1] == "", "rank 0 speaks"


def kempnerforge(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kempnerforge", *map(str, arguments)]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environ)


@pytest.mark.smoke
def test_eval_path_not_a_step_lists_steps(trained: Run, tmp_path: Path) -> None:
    done = kempnerforge("eval", trained.folder)
    assert done.returncode == 2
    assert "steps in" in done.stderr
    assert "8, 6, 4" in done.stderr
    done = kempnerforge("eval", tmp_path / "missing", "--eval.num_batches=1")
    assert done.returncode == 2
    assert "does not exist" in done.stderr


@pytest.mark.smoke
def test_eval_step_without_config_is_refused(tmp_path: Path) -> None:
    import torch

    from kempnerforge.checkpoint.async_save import AsyncCheckpointer

    AsyncCheckpointer().save({"w": torch.zeros(2)}, tmp_path / "own")
    done = kempnerforge("eval", tmp_path / "own")
    assert done.returncode == 2
    assert "has no config.toml with [model]" in done.stderr


STORED = {"train": {"global_batch_size": 4, "batch_size": 1}, "data": {"text": "python-stdlib"}}


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("stored", "overrides", "ranks", "layout", "left_aside"),
    [
        ({}, [], 4, (1, 4), False),
        ({"dp_shard": 4}, [], 4, (1, 4), False),
        ({"dp_shard": 4}, [], 2, (1, 2), True),
        ({"dp_replicate": 2, "dp_shard": 2}, [], 1, (1, 1), True),
        ({"dp_replicate": 2, "dp_shard": 2}, ["--distributed.dp_shard=1"], 2, (2, 1), False),
        ({"dp_shard": 8}, ["--distributed.dp_replicate=2"], 4, (2, 2), True),
    ],
)
def test_eval_layout_of_step_kept_where_it_fits(
    stored: dict[str, int], overrides: list[str], ranks: int, layout: tuple[int, int], left_aside: bool
) -> None:
    config = {**STORED, "distributed": {"timeout_s": 7.0, **stored}}
    loaded, note = load_for(config, overrides, forced=FORCED, where="config.toml", ranks=ranks)
    geometry = loaded.job.geometry(ranks)
    assert (geometry.dp_replicate, geometry.dp_shard) == layout
    assert loaded.job.distributed.timeout_s == 7.0
    assert loaded.job.eval.interval == 1
    assert bool(note) is left_aside


@pytest.mark.smoke
def test_eval_indivisible_batch_reports_sizes_that_fit() -> None:
    with pytest.raises(ConfigError, match="global_batch_size 3 or 6 would fit"):
        load_for({**STORED, "distributed": {"dp_shard": 4}}, [], forced=FORCED, where="config.toml", ranks=3)
