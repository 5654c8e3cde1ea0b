"""The command lines as a user meets them: ``kempnerforge config`` and ``scripts/train.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli

from kempnerforge import __version__
from kempnerforge.cli.train import main, rank_and_world_size, split_config
from kempnerforge.config.schema import load_job
from kempnerforge.errors import ConfigError

ROOT = Path(__file__).parents[2]
HELP = ROOT / "tests/e2e/golden" / "train_help.txt"
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID")

BAD = """
[train]
seed = 1.5
batchsize = 8
"""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def bad_file(tmp_path: Path) -> Path:
    file = tmp_path / "bad.toml"
    file.write_text(BAD)
    return file


def run(*command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def kempnerforge(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-c", "from kempnerforge.cli.app import main; main()", *arguments)


def assert_refused(done: subprocess.CompletedProcess[str], *messages: str) -> None:
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    for message in messages:
        assert message in done.stderr


def test_version() -> None:
    done = kempnerforge("--version")
    assert (done.returncode, done.stdout) == (0, f"kempnerforge {__version__}\n")


def test_check_says_what_a_valid_file_amounts_to() -> None:
    done = kempnerforge("config", "check", "configs/llama_70b.toml", "--world-size", "256")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "configs/llama_70b.toml: valid",
        "  68,976,648,192 parameters",
        "  256 processes: dp_replicate 4 x dp_shard 64 x tp 1 x pp 1",
        "  global batch: 1024 sequences (4,194,304 tokens), 4 x batch_size 1 on each data-parallel rank",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["configs/debug.toml", "--train.seed=7", "--distributed.dp_shard", "-1"],
        ["--train.seed", "7", "configs/debug.toml", "--world-size=2"],
        ["--world-size", "2", "configs/debug.toml", "--run.name=-x", "--run.name", "7"],
        ["configs/debug.toml", "--run.dir=/scratch/{job_id}"],
    ],
)
def test_check_takes_overrides_anywhere(arguments: list[str]) -> None:
    done = kempnerforge("config", "check", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("configs/debug.toml: valid\n")
    assert ("filled in by the SLURM job" in done.stdout) == ("--run.dir=/scratch/{job_id}" in arguments)


def test_check_refuses(bad_file: Path) -> None:
    done = kempnerforge("config", "check", str(bad_file), "--lr=3", "--world-size=2", "extra")
    assert_refused(
        done,
        f"{bad_file}: 5 faults in the configuration",
        "train.seed: 1.5 is not an integer",
        "train.batchsize: is not a known key; did you mean train.batch_size?",
        "--lr: is not a known key; did you mean optimizer.lr?  [command line]",
        "extra: is not an override",
        "data.text: neither text nor dataset_path is set",
    )


@pytest.mark.parametrize(
    "arguments", [["check"], ["check", "--train.seed=1"], ["check", "x", "--world-size=0"], ["nonsense"]]
)
def test_wrong_usage(arguments: list[str]) -> None:
    assert_refused(kempnerforge("config", *arguments), "Usage:")


def test_check_refuses_a_world_size_that_does_not_fit() -> None:
    done = kempnerforge("config", "check", "configs/llama_7b.toml", "--world-size", "16")
    assert_refused(
        done, "distributed.dp_shard: ", "= 32, but processes started: 16", "[configs/llama_7b.toml]"
    )


def test_show_is_toml_with_where_each_value_came_from() -> None:
    overrides = ["--train.seed=7", "--run.name=seven"]
    done = kempnerforge("config", "show", "configs/llama_13b.toml", *overrides)
    assert done.returncode == 0, done.stderr
    job = load_job(ROOT / "configs/llama_13b.toml", overrides).job
    assert tomli.loads(done.stdout) == tomli.loads(job.to_toml())
    lines = {
        line.partition("  # ")[0].strip(): line.partition("  # ")[2] for line in done.stdout.splitlines()
    }
    assert lines["dim = 5120"] == "configs/llama_13b.toml"
    assert lines["vocab_size = 32000"] == "configs/llama_7b.toml"
    assert lines["seed = 7"] == "command line"
    assert lines["eps = 1e-08"] == "default"
    assert lines['# n_kv_heads = "none"'] == "default"
    assert all(line.startswith("[") or not line or "  # " in line for line in done.stdout.splitlines())


def test_schema_is_json() -> None:
    done = kempnerforge("config", "schema")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["title"] == "JobConfig"
    assert kempnerforge("config", "schema", "configs/debug.toml").stdout == done.stdout


def test_the_command_line_is_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    """A change here is a change for users: write the file anew only on purpose, and say so in CHANGELOG.

    python scripts/train.py --help > tests/golden/train_help.txt
    """
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == HELP.read_text()
    assert main(["--config", "x.toml", "-h"]) == 0
    assert capsys.readouterr().out == HELP.read_text()


def test_train_refuses_before_anything_starts(bad_file: Path) -> None:
    done = run("scripts/train.py", "--config", str(bad_file), "--scheduler.name=cosin")
    assert_refused(done, "4 faults", 'did you mean "cosine"?', "See: python scripts/train.py --help")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config: is missing; write --config FILE"),
        (["--config"], "--config: is missing"),
        (["--config", "--train.seed=1"], "--config: is missing"),
        (["--config", "nowhere/x.toml"], "nowhere/x.toml does not exist"),
        (["configs/debug.toml"], "--config: is missing"),
        (["--config", "configs/debug.toml", "oops"], "oops: is not an override"),
    ],
)
def test_train_says_what_is_wrong_with_its_arguments(
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
def test_only_the_first_rank_speaks_and_all_end_alike(
    bad_file: Path,
    environ: dict[str, str],
    speaks: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(["--config", str(bad_file)]) == 2
    assert bool(capsys.readouterr().err) == speaks
    assert main(["--help"]) == 0
    assert bool(capsys.readouterr().out) == speaks


def test_train_checks_the_layout_it_was_started_with(
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
def test_rank_and_world_size(environ: dict[str, str], expected: tuple[int, int]) -> None:
    assert rank_and_world_size(environ) == expected


@pytest.mark.parametrize("value", ["two", "0", "-1", ""])
def test_a_world_size_that_is_none(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", value)
    assert main(["--config", "configs/debug.toml"]) == 2
    assert f'WORLD_SIZE: "{value}" is not an integer >= 1' in capsys.readouterr().err


def test_the_last_config_counts_and_values_may_look_like_it() -> None:
    arguments = ["--config=a.toml", "--run.name", "x", "--config", "b.toml"]
    assert split_config(arguments) == ("b.toml", ["--run.name", "x"])
    with pytest.raises(ConfigError):
        split_config(["--configs=a.toml"])


TORCH_FREE = [
    "import kempnerforge.config.schema",
    "from kempnerforge.cli.app import main\nsys.argv = ['kf', 'config', 'check', 'configs/debug.toml']\n"
    "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code",
    "from kempnerforge.cli.train import main\nassert main(['--config', 'configs/debug.toml', '--x=1']) == 2",
    "from kempnerforge.cli.train import main\nassert main(['--help']) == 0",
]


@pytest.mark.parametrize("code", TORCH_FREE)
def test_no_torch_before_there_is_something_to_train(code: str) -> None:
    done = run("-c", f"import sys\n{code}\nassert 'torch' not in sys.modules, 'torch was imported'\n")
    assert done.returncode == 0, done.stderr
