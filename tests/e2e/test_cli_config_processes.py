"""``kempnerforge config`` and ``scripts/train.py`` as processes; unit/test_cli_config.py has more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).parents[2]
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_config_check_valid_file_prints_summary() -> None:
    done = run(
        "-c",
        "from kempnerforge.cli.app import main; main()",
        "config",
        "check",
        "configs/llama_70b.toml",
        "--world-size=256",
        "--no-files",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "configs/llama_70b.toml: valid",
        "  68,976,648,192 parameters",
        "  256 processes: dp_replicate 4 x dp_shard 64 x tp 1 x pp 1",
        "  global batch: 1024 sequences (4,194,304 tokens), 4 x batch_size 1 on each data-parallel rank",
        "  length: 480,000 steps, 2.0T tokens",
    ]


def test_train_bad_config_refused_before_start(tmp_path: Path) -> None:
    bad_file = tmp_path / "bad.toml"
    bad_file.write_text("[train]\nseed = 1.5\nbatchsize = 8\n")
    done = run("scripts/train.py", "--config", str(bad_file), "--scheduler.name=cosin")
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    for message in ("4 faults", 'did you mean "cosine"?', "See: kempnerforge config keys"):
        assert message in done.stderr
    assert done.stdout == ""


TORCH_FREE = [
    "import kempnerforge.config.schema",
    "from kempnerforge.cli.app import main\nsys.argv = ['kf', 'config', 'check', 'configs/debug.toml']\n"
    "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code",
    "from kempnerforge.cli.train import main\nassert main(['--config', 'configs/debug.toml', '--x=1']) == 2",
    "from kempnerforge.cli.train import main\nassert main(['--help']) == 0",
]


@pytest.mark.parametrize("code", TORCH_FREE)
def test_cli_imports_no_torch_before_training(code: str) -> None:
    done = run("-c", f"import sys\n{code}\nassert 'torch' not in sys.modules, 'torch was imported'\n")
    assert done.returncode == 0, done.stderr
