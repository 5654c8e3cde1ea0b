"""The search path of KempnerForge's own processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import kempnerforge
from kempnerforge.python_process import python_options, search_path


def test_search_path_working_directory_is_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for first in ("", str(tmp_path)):
        monkeypatch.setattr(sys, "path", [first, "/own/models", "/usr/lib/python"])
        assert search_path() == ["/own/models", "/usr/lib/python", first]
        assert python_options() == ["-P"]


def test_search_path_own_checkout_stays_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """KempnerForge that is not installed is found in it, instead of another one that is."""
    folder = Path(kempnerforge.__path__[0]).parent
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), "/usr/lib/python"])
    assert search_path() == [str(folder), "/usr/lib/python"]
    assert python_options() == []


def test_search_path_deleted_directory_same_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setattr(sys, "path", ["", "/usr/lib/python"])
    assert search_path() == ["", "/usr/lib/python"]
