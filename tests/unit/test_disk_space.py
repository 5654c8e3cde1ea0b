"""Whether a save fits: on a real small file system, and with quotas as the tools print them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.tmpfs import mounted_tmpfs

from kempnerforge.checkpoint.retention import quota
from kempnerforge.checkpoint.retention.disk_space import (
    Action,
    SpaceCheck,
    check,
    make_room,
    next_action,
    require_one_save,
)
from kempnerforge.checkpoint.retention.quota import Mount, Quota, Quotas
from kempnerforge.errors import NoSpaceError

MB = 1 << 20
FITS = SpaceCheck(Path("x"), 10 * MB, 8, 100 * MB, 1000, "file system", fits=True)
TOO_LARGE = replace(FITS, free_bytes=4 * MB, fits=False)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB and 200 files."""
    with mounted_tmpfs(tmp_path / "disk", "size=8m,nr_inodes=200") as folder:
        yield folder


def write(path: Path, size_bytes: int) -> None:
    path.write_bytes(bytes(size_bytes))


# The file system


def test_space_check_measures_own_file_system(small_disk: Path) -> None:
    not_made_yet = small_disk / "run" / "checkpoints"
    assert check(not_made_yet, 7 * MB, reserve_bytes=0).fits
    nearly_all = 8 * MB - 100_000
    assert check(not_made_yet, nearly_all, reserve_bytes=50_000).fits
    assert check(not_made_yet, 8 * MB - 200_000, reserve_bytes=64 * MB).fits, "2% of a small disk at most"
    verdict = check(not_made_yet, nearly_all, reserve_bytes=64 * MB)
    assert not verdict.fits
    disk = os.statvfs(small_disk)
    assert verdict.free_bytes == disk.f_bavail * disk.f_frsize == 8 * MB
    left = f"8.4 MB and {disk.f_favail} files left (file system)"
    assert str(verdict) == f"a save needs 8.3 MB in 0 files; {not_made_yet} has {left}"
    write(small_disk / "other", 3 * MB)
    assert not check(not_made_yet, 7 * MB, reserve_bytes=0).fits
    assert check(not_made_yet, 5 * MB, reserve_bytes=0).fits


def test_space_check_too_few_files_does_not_fit(small_disk: Path) -> None:
    assert check(small_disk, 0, needed_files=100, reserve_bytes=0).fits
    for number in range(100):
        (small_disk / str(number)).touch()
    verdict = check(small_disk, 0, needed_files=100, reserve_bytes=0)
    assert not verdict.fits
    assert verdict.free_files == os.statvfs(small_disk).f_favail < 100


def test_space_check_fitting_size_can_be_written(small_disk: Path) -> None:
    verdict = check(small_disk, 0, reserve_bytes=0)
    assert verdict.free_bytes is not None
    assert check(small_disk, verdict.free_bytes, reserve_bytes=0).fits
    assert not check(small_disk, verdict.free_bytes + 1, reserve_bytes=0).fits
    write(small_disk / "save", verdict.free_bytes)


def test_make_room_prunes_only_when_needed(small_disk: Path) -> None:
    steps = {4: small_disk / "4", 8: small_disk / "8"}
    for path in steps.values():
        write(path, 3 * MB)
    pruned: list[int] = []

    def prune() -> list[int]:
        # Retention keeps the newest one.
        if 4 in pruned:
            return []
        steps[4].unlink()
        pruned.append(4)
        return [4]

    def look(size_bytes: int) -> SpaceCheck:
        return check(small_disk, size_bytes, reserve_bytes=0)

    assert make_room(lambda: look(MB), prune).fits
    assert pruned == [], "nothing is deleted while there is room"
    room = make_room(lambda: look(4 * MB), prune)
    assert room.fits
    assert room.pruned == [4]
    room = make_room(lambda: look(6 * MB), prune)
    assert not room.fits
    assert room.pruned == []
    assert steps[8].exists()
    warning = room.warning(12)
    assert warning.startswith("NO CHECKPOINT of step 12: a save needs 6.3 MB")
    assert "Training continues" in warning


@pytest.mark.parametrize(
    ("verdict", "has_pruned", "action"),
    [
        (FITS, False, Action.save),
        (FITS, True, Action.save),
        (TOO_LARGE, False, Action.prune),
        (TOO_LARGE, True, Action.skip),
    ],
)
def test_space_decide_table_matches(verdict: SpaceCheck, has_pruned: bool, action: Action) -> None:
    assert next_action(verdict, has_pruned=has_pruned) is action


# Before training


def test_require_one_save_too_large_refused() -> None:
    assert require_one_save(FITS, prunable_bytes=0) == ""
    with pytest.raises(NoSpaceError) as caught:
        require_one_save(TOO_LARGE, prunable_bytes=0)
    assert caught.value.exit_status == 2
    for part in (
        "not one checkpoint would fit",
        "needs 10.5 MB",
        "4.2 MB",
        "checkpoint.dir",
        "save_last=false",
    ):
        assert part in str(caught.value)
    with pytest.raises(NoSpaceError):
        require_one_save(TOO_LARGE, prunable_bytes=5 * MB)
    assert "older checkpoints will be deleted" in require_one_save(TOO_LARGE, prunable_bytes=6 * MB)


def test_require_one_save_too_few_files_refused() -> None:
    verdict = replace(FITS, free_bytes=None, free_files=3, limited_by="user quota", fits=False)
    with pytest.raises(NoSpaceError, match="has space and 3 files left"):
        require_one_save(verdict, prunable_bytes=0)
    assert require_one_save(verdict, prunable_bytes=1)


def test_require_one_save_unknown_quota_reported() -> None:
    reported = require_one_save(replace(FITS, unread="no command quota here"), prunable_bytes=0)
    assert reported == "quota unknown, so only the file system is checked (no command quota here)"


# Quotas


def test_space_check_tightest_limit_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A disk with 100 MiB and 10,000 files left, whatever this machine has.
    disk = SimpleNamespace(f_blocks=200, f_bavail=100, f_frsize=MB, f_files=20_000, f_favail=10_000)
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    quotas = Quotas((Quota("user quota", 50 * MB, None), Quota("group quota", 20 * MB, 500)))
    verdict = check(tmp_path, 21 * MB, reserve_bytes=0, quotas=quotas)
    assert (verdict.fits, verdict.free_bytes, verdict.limited_by) == (False, 20 * MB, "group quota")
    assert check(tmp_path, 19 * MB, reserve_bytes=0, quotas=quotas).fits
    verdict = check(tmp_path, MB, needed_files=600, reserve_bytes=0, quotas=quotas)
    assert (verdict.fits, verdict.free_files, verdict.limited_by) == (False, 500, "group quota")


QUOTA_OUTPUT = """\
Disk quotas for user alice (uid 1000): 
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
{fs} 6000{star}    5000   10000  {grace}     100     150     200       0
"""  # noqa: W291 - as the tool prints it
LFS_OUTPUT = (
    "/mnt/a-long-lustre-mount-point\n             [6000]{star}   5000   10000  {grace}   100  150  200   -\n"
)
NO_QUOTA = "Disk quotas for user alice (uid 1000): none\n"
NO_LIMITS = "/dev/sda1 6000 0 0 0 100 0 0 0\n"
LUSTRE_DEFAULT = "/lustre 6000 0 10000 - 100 0 0 -\nuid 1000 is using default block quota setting\n"


@pytest.mark.parametrize(
    ("output", "left"),
    [
        (QUOTA_OUTPUT.format(fs="/dev/sda1", star="", grace="0"), [(4000, 100)]),
        (QUOTA_OUTPUT.format(fs="server:/export/home", star="*", grace="1764000000"), [(4000, 100)]),
        (LFS_OUTPUT.format(star="", grace="-"), [(4000, 100)]),
        (LFS_OUTPUT.format(star="*", grace="6d23h59m59s"), [(4000, 100)]),
        (LUSTRE_DEFAULT, [(4000, None)]),
        (NO_LIMITS, [(None, None)]),
        ("/dev/sda1 6000 7000 0 0 100 90 0 0\n", [(1000, 0)]),
        ("/dev/a 12000* 0 10000 0 1 0 0 0\n/dev/b 1 0 2 0 1 0 0 0\n", [(0, None), (1, None)]),
        (NO_QUOTA, []),
        ("", []),
        ("quota: error 5 of 7 on 1 2 3\n", []),
    ],
)
def test_quota_tool_output_table_parsed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    left: list[tuple[int | None, int | None]],
) -> None:
    commands: list[list[str]] = []

    def tool(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=0, communicate=lambda timeout: (output, ""))

    monkeypatch.setattr(quota.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(quota.subprocess, "Popen", tool)
    found = quota.read_quotas(tmp_path)
    assert [("-u" in command, "-g" in command) for command in commands] == [(True, False), (False, True)]
    assert found.unread == ""
    for whose in ("user quota", "group quota"):
        kib = [
            (one.free_bytes // 1024 if one.free_bytes is not None else None, one.free_files)
            for one in found.known
            if one.whose == whose
        ]
        assert kib == left


def test_quota_find_mount_innermost_found(small_disk: Path) -> None:
    inside = small_disk / "a" / "b"
    assert quota.find_mount(inside) == Mount(str(small_disk), "tmpfs", "tmpfs")
    assert quota.find_mount(small_disk.parent).point != str(small_disk)
    assert quota.find_mount(Path(f"{small_disk}-other")).point != str(small_disk)


MOUNTINFO = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /data/team rw - lustre mgs@o2ib:/fs rw
31 22 0:41 / /data rw,noatime shared:5 master:1 - nfs4 server:/export rw
32 31 0:42 / /data/with\\040space rw - xfs /dev/sdb1 rw
33 31 0:43 / /data/twice rw - tmpfs first rw
34 33 0:44 / /data/twice rw - tmpfs second rw
"""


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("/", "/dev/vda"),
        ("/home/x", "/dev/vda"),
        ("/database", "/dev/vda"),
        ("/data", "server:/export"),
        ("/data/teams", "server:/export"),
        ("/data/team/run", "mgs@o2ib:/fs"),
        ("/data/with space/run", "/dev/sdb1"),
        ("/data/twice/x", "second"),
    ],
)
def test_quota_innermost_of_nested_mounts_found(path: str, source: str) -> None:
    assert quota.innermost(MOUNTINFO, path).source == source
