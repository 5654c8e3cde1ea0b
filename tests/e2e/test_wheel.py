"""The installed wheel, in an empty folder: a new config, training on two ranks, and a rank that is killed."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.polling import wait_until
from support.run_files import RunFiles

ROOT = Path(__file__).parents[2]
OVERRIDES = ["--processes=2", "--train.max_steps=100000", "--checkpoint.interval=20", "--eval.interval=0"]


def run(*command: str | Path, **options: object) -> str:
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bin_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel, and with the dependencies of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("kempnerforge", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    is_new = int(importlib.metadata.version("setuptools").partition(".")[0]) >= 77
    options = ["--no-build-isolation"] if is_new else []
    pip = [sys.executable, "-m", "pip", "--quiet"]
    run(*pip, "wheel", "--no-deps", *options, f"--wheel-dir={folder}", source)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env")
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "env/bin/python"
    run(*pip, f"--python={python}", "install", "--no-deps", "--no-index", "--force-reinstall", wheel)
    return python.parent


def test_wheel_trains_in_an_empty_folder(bin_dir: Path, tmp_path: Path) -> None:
    made = run(bin_dir / "kempnerforge", "config", "new", "debug", cwd=tmp_path)
    assert made == "wrote debug.toml. To train: kempnerforge train debug.toml\n"
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [bin_dir / "kempnerforge", "train", "debug.toml", *OVERRIDES],
            env=environ,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        files = RunFiles(tmp_path / "runs/debug", tmp_path / "runs/debug/checkpoints")
        wait_until(lambda: files.checkpoints.exists() and files.committed(), "a commit", timeout_s=200)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        wait_until(lambda: len(files.receipts()) == 2, "a restart in place", timeout_s=100)
        process.send_signal(signal.SIGINT)
        assert process.wait(100) == 75, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
    output = (tmp_path / "log").read_text()
    assert "rank 1 was ended by SIGKILL. Restarting all ranks from step" in output
    assert "Traceback" not in output
    located = run(bin_dir / "python", "-c", "import kempnerforge; print(kempnerforge.__file__)", cwd=tmp_path)
    assert Path(located.strip()).is_relative_to(bin_dir.parent)
