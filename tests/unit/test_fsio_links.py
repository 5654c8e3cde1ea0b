"""What others may put into a shared folder does not choose which file is written."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
from pathlib import Path

import pytest

from kempnerforge import fsio
from kempnerforge.checkpoint.save import writer_process
from kempnerforge.checkpoint.save.writer_process import PROGRESS_BYTES, SharedProgress
from kempnerforge.goodput.event_log import Ledger


def test_append_through_a_link_is_refused(tmp_path: Path) -> None:
    """`ledger.jsonl` is a link to somebody's shell start-up file."""
    bashrc = tmp_path / "bashrc"
    bashrc.write_text("alias ll='ls -l'\n")
    (tmp_path / "ledger.jsonl").symlink_to(bashrc)
    with pytest.raises(OSError, match=r"symbolic link, which is not written to: .*ledger\.jsonl"):
        Ledger(tmp_path, 1).write("start", reason="$(rm -rf ~)")
    with pytest.raises(OSError, match="symbolic link"):
        Ledger(tmp_path, 1).write("progress", step=1)
    assert bashrc.read_text() == "alias ll='ls -l'\n"


def test_append_to_a_pipe_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    os.mkfifo(tmp_path / "ledger.jsonl")
    with pytest.raises(OSError, match="is not a regular file"):
        fsio.append_line(tmp_path / "metrics.jsonl", "{}")
    with pytest.raises(OSError, match="is a pipe, which is not written to"):
        Ledger(tmp_path, 1).write("progress", step=1)
    with pytest.raises(OSError, match="Is a directory"):
        fsio.append_line(tmp_path, "{}")


def test_writer_of_a_dead_trainer_ends_before_next_block() -> None:
    """Also where everything is staged, and it would not look at the trainer any more."""
    fd = os.memfd_create("progress")
    os.ftruncate(fd, PROGRESS_BYTES)
    progress = SharedProgress(fd)
    os.close(fd)
    progress.staged = 100
    ours, theirs = socket.socketpair()
    with theirs:
        writer_process._wait_until_staged(progress, 50, theirs)
        ours.close()
        with pytest.raises(ConnectionAbortedError):
            writer_process._wait_until_staged(progress, 100, theirs)


def test_writer_takes_descriptors_above_1023() -> None:
    """The writer has the numbers of the trainer, which may have many files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 1200:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1200, hard))
    fd = os.memfd_create("progress")
    os.ftruncate(fd, PROGRESS_BYTES)
    progress = SharedProgress(fd)
    ours, theirs = socket.socketpair()
    high = socket.socket(fileno=fcntl.fcntl(theirs, fcntl.F_DUPFD, 1100))
    with ours, theirs, high:
        progress.staged = 100
        writer_process._wait_until_staged(progress, 100, high)
    os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_private_file_is_for_the_user_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    fsio.atomic_write(tmp_path / "note.txt", b"x", private=True)
    assert (tmp_path / "note.txt").stat().st_mode & 0o777 == 0o600
