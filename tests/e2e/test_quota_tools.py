"""Quotas as the tools of the system report them: programs that answer, fail and hang."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from kempnerforge.checkpoint.retention import quota
from kempnerforge.checkpoint.retention.disk_space import check
from kempnerforge.checkpoint.retention.quota import Mount

pytestmark = pytest.mark.smoke

NO_LIMITS = "/dev/sda1 6000 0 0 0 100 0 0 0\n"


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands that is all of PATH but for the shell's own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "sleep", "cat"):
        found = next(path for path in (f"/usr/bin/{name}", f"/bin/{name}") if os.path.exists(path))
        (folder / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def install(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!{folder}/sh\n{script}\n")
    path.chmod(0o755)


def test_quota_requested_for_user_and_group(tools: Path, tmp_path: Path) -> None:
    requested = tmp_path / "requested"
    user, group = NO_LIMITS.replace("0 0 0 100", "0 9000 0 100"), NO_LIMITS.replace("6000 0 0", "6000 0 7000")
    answer = f'case "$*" in *-u*) echo "{user.strip()}";; *) echo "{group.strip()}";; esac'
    install(tools, "quota", f'echo "$*" >>{requested}\n{answer}\nexit 1')
    found = quota.read_quotas(tmp_path)
    assert found.unread == ""
    assert [(one.whose, one.free_bytes) for one in found.known] == [
        ("user quota", 3000 * 1024),
        ("group quota", 1000 * 1024),
    ]
    point = quota.find_mount(tmp_path).point
    assert requested.read_text().splitlines() == [
        f"-w -p -v --filesystem={point} -u {os.geteuid()}",
        f"-w -p -v --filesystem={point} -g {os.getegid()}",
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder to another group needs root")
def test_quota_group_is_that_of_new_files(tools: Path, tmp_path: Path) -> None:
    requested = tmp_path / "requested"
    install(tools, "quota", f'echo "$*" >>{requested}')
    shared = tmp_path / "shared"
    shared.mkdir()
    os.chown(shared, -1, 4321)
    shared.chmod(0o755 | stat.S_ISGID)
    quota.read_quotas(shared)
    assert requested.read_text().splitlines()[1].endswith("-g 4321")


def test_quota_lustre_uses_lfs(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "find_mount", lambda _: Mount("/mnt/lustre", "lustre", "mgs:/fs"))
    assert quota.read_quotas(tmp_path).unread == "no command lfs here"
    install(tools, "lfs", 'echo "$6 6000 0 10000 - 100 0 0 -"')
    found = quota.read_quotas(tmp_path)
    assert [(one.whose, one.free_bytes, one.free_files) for one in found.known] == [
        ("user quota", 4000 * 1024, None),
        ("group quota", 4000 * 1024, None),
    ]


@pytest.mark.parametrize(
    ("script", "unread"),
    [
        (None, "no command quota here"),
        ("echo 'quota: no such device' >&2; exit 1", "quota: no such device"),
        ("exit 3", "exit status 3"),
        ("echo none", ""),
    ],
)
def test_quota_unreadable_is_no_limit_and_is_reported(
    tools: Path, tmp_path: Path, script: str | None, unread: str
) -> None:
    if script is not None:
        install(tools, "quota", script)
    found = quota.read_quotas(tmp_path)
    assert found.known == ()
    assert found.unread.endswith(unread)
    assert bool(found.unread) is bool(unread)
    verdict = check(tmp_path, 1, reserve_bytes=0, quotas=found)
    assert verdict.fits
    assert verdict.unread == found.unread


def test_quota_hanging_tool_is_given_up(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "TIMEOUT_S", 0.2)
    # It is called twice: had either been waited for, or left running, this test would fail.
    install(tools, "quota", "exec sleep 1000")
    found = quota.read_quotas(tmp_path)
    assert found.unread.count("no answer after 0.2 s") == 2
    assert found.known == ()
