"""What quotas leave of a file system, asked of the tools of clusters: ``quota``, and ``lfs`` for Lustre.

``statvfs`` does not know of user and group quotas. (Project and directory quotas of XFS, ext4 and many
network file systems it does know: they make the file system look smaller.) A tool that is missing, fails or
does not answer means that nothing is known, which is reported and never taken for "no limit" or "no room".
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 5.0
"""A server of quotas that is down must not hold a run up."""

_UNIT_BYTES = 1024
_NUMBER = re.compile(r"\[?(\d+)\]?\*?")
_FIELDS = 8
"""Used, soft limit, hard limit and grace time, of space and then of files."""


@dataclass(frozen=True)
class Quota:
    """What one limit leaves; None where there is no limit."""

    whose: str
    free_bytes: int | None
    free_files: int | None


@dataclass(frozen=True)
class Quotas:
    """What is known of the quotas on one file system."""

    known: tuple[Quota, ...] = ()
    unread: str = ""
    """Why nothing, or not all, is known; empty when all was read."""


@dataclass(frozen=True)
class Mount:
    """The file system that a folder is on."""

    point: str
    fs_type: str
    source: str


def read_quotas(folder: Path) -> Quotas:
    """Quotas that count for a new file in ``folder``, which exists. Blocks for seconds at most.

    Raises OSError when the folder cannot be looked at.
    """
    mount = find_mount(folder)
    looked = folder.stat()
    # New files belong to the folder's group where its setgid bit is set. Quotas of other groups do not count.
    gid = looked.st_gid if looked.st_mode & stat.S_ISGID else os.getegid()
    if mount.fs_type == "lustre":
        ask, where = ["lfs", "quota", "-q"], [mount.point]
    else:
        # -v: also where nothing is used yet. -p: a grace time in every line, so that columns are fixed.
        ask, where = ["quota", "-w", "-p", "-v", f"--filesystem={mount.point}"], []
    commands = {
        "user": [*ask, "-u", str(os.geteuid()), *where],
        "group": [*ask, "-g", str(gid), *where],
    }
    known: list[Quota] = []
    unread = []
    for whose, command in commands.items():
        output, problem = _ask(command)
        known += [_left(f"{whose} quota", fields) for fields in parse(output)]
        if problem:
            unread.append(problem)
    return Quotas(tuple(known), "; ".join(dict.fromkeys(unread)))


def parse(output: str) -> list[list[str]]:
    """The groups of eight fields that follow a file system's name, wherever lines are broken."""
    words = output.split()
    found = []
    place = 0
    while place + _FIELDS <= len(words):
        fields = words[place : place + _FIELDS]
        numbers = [*fields[0:3], *fields[4:7]]
        if all(_NUMBER.fullmatch(word) for word in numbers):
            found.append(fields)
            place += _FIELDS
        else:
            place += 1
    return found


def find_mount(folder: Path) -> Mount:
    """The mount that ``folder`` is on, from ``/proc/self/mountinfo``; without it, the root of everything."""
    try:
        listing = Path("/proc/self/mountinfo").read_text()
    except OSError:
        listing = ""
    return innermost(listing, os.path.realpath(folder))


def innermost(mountinfo: str, path: str) -> Mount:
    """Of the mounts in a ``mountinfo`` listing, the one that ``path``, without links, is on."""
    best = Mount("/", "", "")
    for line in mountinfo.splitlines():
        # The fields after the separator are counted from there: those before it vary in number.
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])
        is_inside = path == point or path.startswith(point.rstrip("/") + "/")
        # Of two mounts on one point the later one is seen.
        if is_inside and len(point) >= len(best.point):
            fs_type, source = after.split()[:2]
            best = Mount(point, fs_type, source)
    return best


def _ask(command: Sequence[str]) -> tuple[str, str]:
    """What the command prints, and why that is not all."""
    if shutil.which(command[0]) is None:
        return "", f"no command {command[0]} here"
    asked = " ".join(command)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        # Its status says whether a quota is exceeded, not whether it was read.
        output, errors = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        # Waited for no longer than this: a process that waits for a dead server cannot be killed.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=1.0)
        return "", f"{asked}: no answer after {TIMEOUT_S:g} s"
    if not output.strip() and (errors.strip() or process.returncode):
        return "", f"{asked}: {(errors.strip() or f'exit status {process.returncode}').splitlines()[0]}"
    return output, ""


def _left(whose: str, fields: Sequence[str]) -> Quota:
    used, soft, hard = (_number(word) for word in fields[0:3])
    used_files, soft_files, hard_files = (_number(word) for word in fields[4:7])
    # A soft limit may be exceeded for a while, so it counts only where there is no hard one.
    limit, limit_files = hard or soft, hard_files or soft_files
    return Quota(
        whose,
        max(0, limit - used) * _UNIT_BYTES if limit else None,
        max(0, limit_files - used_files) if limit_files else None,
    )


def _number(word: str) -> int:
    match = _NUMBER.fullmatch(word)
    assert match is not None
    return int(match[1])
