"""``kempnerforge data`` as a command: exit statuses, and a start without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    """A working folder with 30 small files in ``texts/``."""
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for number in range(30):
        Path("texts", f"{number:02d}.txt").write_text(f"text number {number}\n")
    return tmp_path


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own."""
    main = "from kempnerforge.cli.app import main; main()"
    return subprocess.run(
        [sys.executable, "-c", main, "data", *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "nothing/*.txt", "--out", "out"], "matches no file"),
        (["prepare", "texts", "--out", "out", "--tokenizer", "absent.json"], "no such file"),
        (["prepare", "texts", "--out", "texts"], "not an empty folder"),
        (["prepare", "texts", "--out", "texts/00.txt/below"], "cannot write prepared tokens"),
        (["prepare", "texts"], "Missing option '--out'"),
        (["prepare", "texts", "--out", "out", "--val-fraction", "1.5"], "--val-fraction"),
        (["inspect", "nowhere"], "no such file or folder"),
        (["inspect", "texts"], "neither index.json nor .npy"),
    ],
)
def test_what_cannot_work_ends_with_2_and_no_traceback(texts, arguments, message):
    done = command(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path("out").exists()


def test_the_command_needs_no_torch():
    code = "import sys, kempnerforge.cli.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
