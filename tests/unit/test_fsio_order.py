"""What is synced when: a crash between two operations must find the old state or the new one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kempnerforge import fsio

CHANGES = ("open", "write", "rename", "replace", "symlink", "unlink", "mkdir", "rmdir")


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done below the test's folder, in order: the operation and the name."""
    done: list[str] = []

    def name_of(target: Any, folder_fd: int | None = None) -> str:
        if isinstance(target, int):
            target = os.readlink(f"/proc/self/fd/{target}")
        elif folder_fd is not None:
            target = f"{os.readlink(f'/proc/self/fd/{folder_fd}')}/{target}"
        name = os.path.relpath(target, tmp_path).replace(str(os.getpid()), "PID")
        return "the folder" if name == "." else name

    def recorded(operation: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **options: Any) -> Any:
            if operation == "open" and not args[0] & os.O_CREAT:
                return real(target, *args, **options)
            named = args[0] if operation in ("symlink", "rename", "replace") else target
            name = name_of(named, options.get("dir_fd"))
            result = real(target, *args, **options)
            done.append(f"{operation} {name}")
            return result

        return call

    for operation in (*CHANGES, "fsync"):
        monkeypatch.setattr(os, operation, recorded(operation, getattr(os, operation)))
    return done


def test_publish_syncs_folder_after_rename(tmp_path: Path, order: list[str]) -> None:
    (tmp_path / ".step.tmp").mkdir()
    order.clear()
    fsio.publish(tmp_path / ".step.tmp", tmp_path / "step")
    assert order == ["rename step", "fsync the folder"]


def test_write_new_file_syncs_its_bytes(tmp_path: Path, order: list[str]) -> None:
    fsio.write_new_file(tmp_path / "a", b"x")
    assert order == ["open a", "write a", "fsync a"]


def test_atomic_write_syncs_bytes_then_replaces_then_syncs(tmp_path: Path, order: list[str]) -> None:
    fsio.atomic_write(tmp_path / "a", b"x")
    new = ".a.PID.tmp"
    assert [entry for entry in order if not entry.startswith("unlink")] == [
        *(f"open {new}", f"write {new}", f"fsync {new}"),
        *("replace a", "fsync the folder"),
    ]


def test_append_line_syncs_line_and_new_name(tmp_path: Path, order: list[str]) -> None:
    fsio.append_line(tmp_path / "log", "1")
    assert order == ["open log", "write log", "fsync log", "fsync the folder"]
    order.clear()
    fsio.append_line(tmp_path / "log", "2")
    assert order[-2:] == ["write log", "fsync log"]


def test_point_symlink_replaces_then_syncs(tmp_path: Path, order: list[str]) -> None:
    fsio.point_symlink(tmp_path / "latest", "step")
    assert [entry for entry in order if not entry.startswith("unlink")] == [
        *("symlink .latest.PID.tmp", "replace latest", "fsync the folder"),
    ]


def test_make_folder_syncs_each_new_name(tmp_path: Path, order: list[str]) -> None:
    fsio.make_folder(tmp_path / "a" / "b")
    assert [entry for entry in order if "PID" not in entry][-4:] == [
        *("mkdir a", "fsync the folder"),
        *("mkdir a/b", "fsync a"),
    ]


def test_delete_syncs_hidden_name_before_first_file_goes(tmp_path: Path, order: list[str]) -> None:
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "shard").write_bytes(b"x")
    order.clear()
    fsio.invalidate_then_delete(tmp_path / "step")
    hidden = fsio.deleting_name("step")
    assert order[:2] == [f"rename {hidden}", "fsync the folder"]
    assert order[2:] == [f"unlink {hidden}/shard", f"rmdir {hidden}"]
