"""What ``kempnerforge data`` refuses: a message and status 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kempnerforge.cli import app


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    """A working folder with 30 small files in ``texts/``."""
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for number in range(30):
        Path("texts", f"{number:02d}.txt").write_text(f"text number {number}\n")
    return tmp_path


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
def test_data_invalid_request_exits_2_without_traceback(texts, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["kempnerforge", "data", *arguments])
    with pytest.raises(SystemExit) as ended:
        app.main()
    printed = capsys.readouterr().err
    assert ended.value.code == 2, printed
    assert message in printed
    assert "Traceback" not in printed
    assert not Path("out").exists()
