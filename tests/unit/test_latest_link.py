"""``latest`` is a convenience: nothing fails without it, and nothing is decided by it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.ckpt_cli import Ckpt
from support.rollback_fixtures import quiet

from kempnerforge.checkpoint.format import latest_link, paths
from kempnerforge.checkpoint.format.latest_link import LatestLink
from kempnerforge.checkpoint.load import candidates
from kempnerforge.checkpoint.tools import rollback
from kempnerforge.checkpoint.tools.fork import fork

pytest_plugins = ["support.rollback_fixtures", "support.ckpt_fixtures"]


def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no symbolic links, such as exFAT. Imitated: none can be mounted here."""

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "symlink", refuse)


def copied(run: Path) -> Path:
    """``latest`` as ``cp -rL`` leaves it: a folder with a copy of an older step."""
    link = run / "checkpoints" / paths.LATEST
    link.unlink(missing_ok=True)
    shutil.copytree(run / "checkpoints" / "step_00000004", link)
    return link


def test_latest_without_links_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_links(monkeypatch)
    link = LatestLink(tmp_path)
    (warning,) = link.point_at(4)
    assert "Operation not permitted" in warning
    assert link.point_at(8) == []
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("what", ["folder", "file"])
def test_latest_that_is_no_link_is_left_alone(tmp_path: Path, what: str) -> None:
    path = tmp_path / paths.LATEST
    path.mkdir() if what == "folder" else path.write_text("mine")
    link = LatestLink(tmp_path)
    (warning,) = link.point_at(4)
    assert "is not a symbolic link, so it is left as it is" in warning
    assert link.point_at(8) == []
    assert os.listdir(tmp_path) == [paths.LATEST]
    assert path.is_dir() if what == "folder" else path.read_text() == "mine"


@pytest.mark.parametrize("target", ["step_00000001", "/nowhere", "../elsewhere", "latest"])
def test_latest_that_points_anywhere_is_replaced(tmp_path: Path, target: str) -> None:
    (tmp_path / paths.LATEST).symlink_to(target)
    assert LatestLink(tmp_path).point_at(8) == []
    assert os.readlink(tmp_path / paths.LATEST) == "step_00000008"


def test_rollback_with_copied_latest_is_done(ended_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    link = copied(ended_run)
    done = rollback.roll_back(ended_run, 8, progress=quiet)
    assert list(done.renamed) == ["step_00000012"]
    assert ["is not a symbolic link" in message for message in caplog.messages] == [True]
    undone = rollback.undo(ended_run)
    assert undone.newest_step == 12
    assert (link / paths.MANIFEST).is_file()


def test_fork_and_rollback_without_links_are_done(
    ended_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_links(monkeypatch)
    assert rollback.roll_back(ended_run, 8, progress=quiet).renamed
    assert len(caplog.messages) == 1
    step = ended_run / "checkpoints" / "step_00000008"
    forked = fork(step, tmp_path / "forked", link=False, progress=quiet)
    assert paths.committed_steps(forked.run_dir / "checkpoints") == [8]
    assert set(os.listdir(forked.run_dir / "checkpoints")) == {"step_00000008", "owner.json"}


@pytest.mark.parametrize("how", ["missing", "copied", "dangling", "older"])
def test_commands_take_newest_step_for_latest(run: Path, ckpt: Ckpt, tmp_path: Path, how: str) -> None:
    link = run / "checkpoints" / paths.LATEST
    link.unlink()
    if how == "copied":
        shutil.copytree(run / "checkpoints" / "step_00000010", link)
    elif how != "missing":
        link.symlink_to("step_00000010" if how == "older" else "step_00000099")
    assert ckpt("inspect", link, "--json").json["step"] == 40
    assert ckpt("verify", link).status == 0
    assert ckpt("fork", link, tmp_path / "forked", "--json").json["step"] == 40
    assert candidates.find_warm_start(link).step == 40


def test_latest_without_steps_beside_is_an_ordinary_name(tmp_path: Path) -> None:
    assert latest_link.resolve(tmp_path / paths.LATEST) == tmp_path / paths.LATEST
