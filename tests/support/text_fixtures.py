"""Folders of small texts: ``pytest_plugins = ["support.text_fixtures"]``."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """200 small documents in nested folders."""
    folder = tmp_path / "notes"
    for number in range(200):
        file = folder / f"part{number % 3}" / f"{number:03d}.md"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# note {number}\n" + f"line of {number}\n" * (number % 7))
    return folder


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with 30 small files in ``texts/``."""
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for number in range(30):
        Path("texts", f"{number:02d}.txt").write_text(f"text number {number}\n")
    return tmp_path
