"""Whether a save fits: on a real small file system, with quota tools that answer, fail and hang."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.tmpfs import mounted_tmpfs

from kempnerforge.checkpoint import quota
from kempnerforge.checkpoint.quota import Mount, Quota, Quotas
from kempnerforge.checkpoint.space import Action, Verdict, check, decide, make_room, require_one_save
from kempnerforge.errors import NoSpaceError

MB = 1 << 20
FITS = Verdict(Path("x"), 10 * MB, 8, 100 * MB, 1000, "file system", fits=True)
TOO_LARGE = replace(FITS, free_bytes=4 * MB, fits=False)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB and 200 files."""
    with mounted_tmpfs(tmp_path / "disk", "size=8m,nr_inodes=200") as folder:
        yield folder


def write(path: Path, size_bytes: int) -> None:
    path.write_bytes(bytes(size_bytes))


# The file system


def test_what_fits_is_measured_on_the_folders_own_file_system(small_disk: Path) -> None:
    not_made_yet = small_disk / "run" / "checkpoints"
    assert check(not_made_yet, 7 * MB, reserve_bytes=0).fits
    nearly_all = 8 * MB - 100_000
    assert check(not_made_yet, nearly_all, reserve_bytes=50_000).fits
    assert check(not_made_yet, 8 * MB - 200_000, reserve_bytes=64 * MB).fits, "2% of a small disk at most"
    verdict = check(not_made_yet, nearly_all, reserve_bytes=64 * MB)
    assert not verdict.fits
    assert verdict.free_bytes == 8 * MB
    assert str(verdict) == (
        f"a save needs 8.3 MB in 0 files; {not_made_yet} has 8.4 MB and 199 files left (file system)"
    )
    write(small_disk / "other", 3 * MB)
    assert not check(not_made_yet, 7 * MB, reserve_bytes=0).fits
    assert check(not_made_yet, 5 * MB, reserve_bytes=0).fits


def test_files_run_out_too(small_disk: Path) -> None:
    assert check(small_disk, 0, needed_files=100, reserve_bytes=0).fits
    for number in range(100):
        (small_disk / str(number)).touch()
    verdict = check(small_disk, 0, needed_files=100, reserve_bytes=0)
    assert not verdict.fits
    assert verdict.free_files == 99


def test_a_save_that_was_judged_to_fit_does(small_disk: Path) -> None:
    verdict = check(small_disk, 0, reserve_bytes=0)
    assert verdict.free_bytes is not None
    assert check(small_disk, verdict.free_bytes, reserve_bytes=0).fits
    assert not check(small_disk, verdict.free_bytes + 1, reserve_bytes=0).fits
    write(small_disk / "save", verdict.free_bytes)


def test_room_is_made_in_the_stated_order(small_disk: Path) -> None:
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

    def look(size_bytes: int) -> Verdict:
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
    assert "Training goes on" in warning


@pytest.mark.parametrize(
    ("verdict", "has_pruned", "action"),
    [
        (FITS, False, Action.save),
        (FITS, True, Action.save),
        (TOO_LARGE, False, Action.prune),
        (TOO_LARGE, True, Action.skip),
    ],
)
def test_the_order(verdict: Verdict, has_pruned: bool, action: Action) -> None:
    assert decide(verdict, has_pruned=has_pruned) is action


# Before training


def test_a_run_that_could_never_save_is_refused() -> None:
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


def test_running_out_of_files_is_judged_too() -> None:
    verdict = replace(FITS, free_bytes=None, free_files=3, limited_by="user quota", fits=False)
    with pytest.raises(NoSpaceError, match="has room and 3 files left"):
        require_one_save(verdict, prunable_bytes=0)
    assert require_one_save(verdict, prunable_bytes=1)


def test_limits_that_are_not_known_are_told() -> None:
    told = require_one_save(replace(FITS, unread="no command quota here"), prunable_bytes=0)
    assert told == "quota not known, so only the file system is watched (no command quota here)"


# Quotas


def test_the_tightest_limit_decides(tmp_path: Path) -> None:
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
def test_answers_of_the_tools(output: str, left: list[tuple[int | None, int | None]]) -> None:
    found = [quota._left("x", fields) for fields in quota.parse(output)]
    kib = [(one.free_bytes // 1024 if one.free_bytes is not None else None, one.free_files) for one in found]
    assert kib == left


def test_the_mount_of_a_folder_is_the_innermost_one(small_disk: Path) -> None:
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
def test_of_nested_mounts_the_innermost_counts(path: str, source: str) -> None:
    assert quota.innermost(MOUNTINFO, path).source == source
