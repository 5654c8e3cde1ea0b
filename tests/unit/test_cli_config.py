"""The command lines as a user meets them: ``kempnerforge config`` and ``scripts/train.py``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli
from support.ckpt_cli import Done
from typer.testing import CliRunner

from kempnerforge import __version__
from kempnerforge.cli import app
from kempnerforge.cli.train import main, rank_and_world_size, split_config
from kempnerforge.config.schema import load_job
from kempnerforge.errors import ConfigError
from kempnerforge.train.run_length import run_length

ROOT = Path(__file__).parents[2]
HELP = Path(__file__).parent / "golden" / "train_help.txt"
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID")

BAD = """
[train]
seed = 1.5
batchsize = 8
"""

Command = Callable[..., Done]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def bad_file(tmp_path: Path) -> Path:
    file = tmp_path / "bad.toml"
    file.write_text(BAD)
    return file


@pytest.fixture
def kempnerforge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Call the command in this process."""

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["kempnerforge", *arguments])
        with pytest.raises(SystemExit) as ended:
            app.main()
        assert isinstance(ended.value.code, int)
        captured = capsys.readouterr()
        return Done(ended.value.code, captured.out, captured.err)

    return call


def assert_refused(done: Done, *messages: str) -> None:
    assert done.status == 2, done
    assert "Traceback" not in done.err
    for message in messages:
        assert message in done.err


def test_cli_version_is_printed(kempnerforge: Command) -> None:
    done = kempnerforge("--version")
    assert (done.status, done.out) == (0, f"kempnerforge {__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["configs/debug.toml", "--train.seed=7", "--distributed.dp_shard", "-1"],
        ["--train.seed", "7", "configs/debug.toml", "--world-size=2"],
        ["--world-size", "2", "configs/debug.toml", "--run.name=-x", "--run.name", "7"],
        ["configs/debug.toml", "--run.dir=/scratch/{job_id}"],
    ],
)
def test_config_check_overrides_anywhere_accepted(kempnerforge: Command, arguments: list[str]) -> None:
    done = kempnerforge("config", "check", *arguments)
    assert done.status == 0, done.err
    assert done.out.startswith("configs/debug.toml: valid\n")
    assert ("filled in by the SLURM job" in done.out) == ("--run.dir=/scratch/{job_id}" in arguments)


@pytest.mark.parametrize(
    ("saves", "warned"),
    [
        (["--checkpoint.interval=7"], True),
        (["--checkpoint.interval=6"], False),
        (["--checkpoint.interval=7", "--checkpoint.at_steps=[40]"], False),
        (["--checkpoint.interval=7", "--checkpoint.best_metric=train/loss"], False),
        (["--checkpoint.interval=auto"], False),
    ],
)
def test_config_check_warns_of_best_without_choice(
    kempnerforge: Command, saves: list[str], warned: bool
) -> None:
    best = ["--checkpoint.keep_best_n=2", "--checkpoint.best_metric=eval/loss"]
    run = ["--train.max_steps=60", "--eval.interval=10", "--scheduler.decay_steps=50"]
    done = kempnerforge("config", "check", "configs/debug.toml", "--no-files", *best, *run, *saves)
    assert done.status == 0, done.err
    assert ("no step before the last is both saved and validated" in done.out) is warned


@pytest.mark.parametrize(
    ("given", "length"),
    [
        ([], "length: 1,000 steps (the default: train.max_steps is not set), 2.0M tokens"),
        (["--train.max_steps=1000"], "length: 1,000 steps, 2.0M tokens"),
        (["--train.max_steps=1"], "length: 1 step, 2.0k tokens"),
    ],
)
def test_config_check_says_length_and_default(kempnerforge: Command, given: list[str], length: str) -> None:
    arguments = ["--train.global_batch_size=8", "--data.text=python-stdlib", "--world-size=1", *given]
    done = kempnerforge("config", "check", os.devnull, *arguments)
    assert length in [line.strip() for line in done.out.splitlines()], done


def test_run_length_global_batch_size_keeps_default_known() -> None:
    """A start that fixes the global batch size still says that the number of steps is the default."""
    job = load_job(None, ["--data.text=x"]).job.with_global_batch_size(16)
    assert run_length(job, 16, num_samples=32_000).startswith("1,000 steps (the default")
    job = load_job(None, ["--data.text=x", "--train.max_steps=1000"]).job.with_global_batch_size(16)
    assert run_length(job, 16, num_samples=32_000) == "1,000 steps, 4.1M tokens, 0.5 epochs"


def test_config_check_invalid_file_lists_all_faults(kempnerforge: Command, bad_file: Path) -> None:
    done = kempnerforge("config", "check", str(bad_file), "--lr=3", "--world-size=2", "extra")
    assert_refused(
        done,
        f"{bad_file}: 5 faults in the configuration",
        "train.seed: 1.5 is not an integer",
        "train.batchsize: is not a known key; did you mean train.batch_size?",
        "--lr: is not a known key; did you mean optimizer.lr?  [command line]",
        "extra: is not an override",
        "data.text: none of text, dataset_path, dataset and sources is set",
    )


@pytest.mark.parametrize(
    "arguments", [["check"], ["check", "--train.seed=1"], ["check", "x", "--world-size=0"], ["nonsense"]]
)
def test_config_wrong_usage_exits_2(kempnerforge: Command, arguments: list[str]) -> None:
    assert_refused(kempnerforge("config", *arguments), "Usage:")


def test_config_check_world_size_mismatch_is_refused(kempnerforge: Command) -> None:
    done = kempnerforge("config", "check", "configs/llama_7b.toml", "--world-size", "16")
    assert_refused(
        done, "distributed.dp_shard: ", "= 32, but processes started: 16", "[configs/llama_7b.toml]"
    )


def test_config_show_prints_toml_with_source_of_each_value(kempnerforge: Command) -> None:
    overrides = ["--train.seed=7", "--run.name=seven"]
    done = kempnerforge("config", "show", "configs/llama_13b.toml", *overrides)
    assert done.status == 0, done.err
    job = load_job(ROOT / "configs/llama_13b.toml", overrides).job
    assert tomli.loads(done.out) == tomli.loads(job.to_toml())
    lines = {line.partition("  # ")[0].strip(): line.partition("  # ")[2] for line in done.out.splitlines()}
    assert lines["dim = 5120"] == "configs/llama_13b.toml"
    assert lines["vocab_size = 32000"] == "configs/llama_7b.toml"
    assert lines["seed = 7"] == "command line"
    assert lines["eps = 1e-08"] == "default"
    assert lines['# n_kv_heads = "none"'] == "default"
    assert all(line.startswith("[") or not line or "  # " in line for line in done.out.splitlines())


def test_config_schema_is_json(kempnerforge: Command) -> None:
    done = kempnerforge("config", "schema")
    assert done.status == 0, done.err
    assert json.loads(done.out)["title"] == "JobConfig"
    assert kempnerforge("config", "schema", "configs/debug.toml").out == done.out


def test_train_help_is_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    """A change here is a change for users: write the file anew only on purpose, and say so in CHANGELOG.

    python scripts/train.py --help > tests/unit/golden/train_help.txt
    """
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == HELP.read_text()
    assert main(["--config", "x.toml", "-h"]) == 0
    assert capsys.readouterr().out == HELP.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config: is missing; write --config FILE"),
        (["--config"], "--config: is missing"),
        (["--config", "--train.seed=1"], "--config: is missing"),
        (["--config", "nowhere/x.toml"], "nowhere/x.toml: does not exist"),
        (["configs/debug.toml"], "--config: is missing"),
        (["--config", "configs/debug.toml", "oops"], "oops: is not an override"),
    ],
)
def test_train_bad_arguments_are_reported(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environ", "speaks"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, False),
    ],
)
def test_train_bad_config_only_rank_0_reports(
    bad_file: Path,
    environ: dict[str, str],
    speaks: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All ranks end with the same status."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(["--config", str(bad_file)]) == 2
    assert bool(capsys.readouterr().err) == speaks
    assert main(["--help"]) == 0
    assert bool(capsys.readouterr().out) == speaks


def test_train_layout_mismatch_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["--config", str(ROOT / "configs/debug.toml")]) == 2
    assert "train.global_batch_size: 4 does not divide by batch_size 1 x 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8", "SLURM_PROCID": "0"}, (3, 8)),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}, (2, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),  # the shell of an sbatch script
        ({"RANK": "0"}, (0, 1)),
    ],
)
def test_rank_and_world_size_from_environment(environ: dict[str, str], expected: tuple[int, int]) -> None:
    assert rank_and_world_size(environ) == expected


@pytest.mark.parametrize("value", ["two", "0", "-1", ""])
def test_train_invalid_world_size_is_refused(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", value)
    assert main(["--config", "configs/debug.toml"]) == 2
    assert f'WORLD_SIZE: "{value}" is not an integer >= 1' in capsys.readouterr().err


def test_split_config_last_config_counts() -> None:
    """Values may look like the option."""
    arguments = ["--config=a.toml", "--run.name", "x", "--config", "b.toml"]
    assert split_config(arguments) == ("b.toml", ["--run.name", "x"])
    with pytest.raises(ConfigError):
        split_config(["--configs=a.toml"])


def test_config_keys_prints_those_with_prefix() -> None:
    printed = CliRunner().invoke(app.app, ["config", "keys", "optimizer.l"])
    assert printed.exit_code == 0
    assert printed.output.startswith("[optimizer]")
    assert [line.split()[0] for line in printed.output.splitlines() if line.startswith("  --")] == [
        "--optimizer.lr"
    ]
    everything = CliRunner().invoke(app.app, ["config", "keys"]).output
    assert "--hooks[].name" in everything
    unknown = CliRunner().invoke(app.app, ["config", "keys", "optimiser"])
    assert isinstance(unknown.exception, ConfigError)
    assert "did you mean [optimizer]?" in str(unknown.exception)
