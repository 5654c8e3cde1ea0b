"""Read how much quotas leave of a file system, with the tools ``quota`` and, for Lustre, ``lfs``.

``statvfs`` does not show user and group quotas. It does show project and directory quotas of XFS,
ext4 and many network file systems, where they make the file system look smaller. If a tool is
missing, fails or does not answer, the quota is unknown. That is reported, and never treated as "no
limit" or "no space".
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
"""Time-out for each command, because a quota server that is down must not delay a run."""

_UNIT_BYTES = 1024
_NUMBER = re.compile(r"\[?(\d+)\]?\*?")
_FIELDS = 8
"""Used, soft limit, hard limit and grace time, for space and then for files."""


@dataclass(frozen=True)
class Quota:
    """What one quota leaves; None for no limit."""

    whose: str
    free_bytes: int | None
    free_files: int | None


@dataclass(frozen=True)
class Quotas:
    """The quotas on one file system, as far as they are known."""

    known: tuple[Quota, ...] = ()
    unread: str = ""
    """Why some quotas are unknown; empty if all were read."""


@dataclass(frozen=True)
class Mount:
    """The file system that a folder is on."""

    point: str
    fs_type: str
    source: str


def read_quotas(folder: Path) -> Quotas:
    """Return the quotas that apply to a new file in the existing ``folder``. Blocks for seconds at most.

    Raises OSError if ``folder`` cannot be examined.
    """
    mount = find_mount(folder)
    looked = folder.stat()
    # New files belong to the folder's group if its setgid bit is set. Quotas of other groups do not apply.
    gid = looked.st_gid if looked.st_mode & stat.S_ISGID else os.getegid()
    if mount.fs_type == "lustre":
        ask, where = ["lfs", "quota", "-q"], [mount.point]
    else:
        # -v: print a quota even if nothing is used. -p: print a grace time on every line, so that the number
        # of columns is fixed.
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
    """Return the groups of eight fields after each file system's name, wherever lines are broken."""
    words = output.split()
    found = []
    position = 0
    while position + _FIELDS <= len(words):
        fields = words[position : position + _FIELDS]
        numbers = [*fields[0:3], *fields[4:7]]
        if all(_NUMBER.fullmatch(word) for word in numbers):
            found.append(fields)
            position += _FIELDS
        else:
            position += 1
    return found


def find_mount(folder: Path) -> Mount:
    """Return the mount that ``folder`` is on, from ``/proc/self/mountinfo``; without that file, ``/``."""
    try:
        listing = Path("/proc/self/mountinfo").read_text()
    except OSError:
        listing = ""
    return innermost(listing, os.path.realpath(folder))


def innermost(mountinfo: str, path: str) -> Mount:
    """Return the mount in a ``mountinfo`` listing that ``path``, with links resolved, is on."""
    best = Mount("/", "", "")
    for line in mountinfo.splitlines():
        # The number of fields before the separator varies.
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])
        is_inside = path == point or path.startswith(point.rstrip("/") + "/")
        # Of two mounts on one point, the later one is visible.
        if is_inside and len(point) >= len(best.point):
            fs_type, source = after.split()[:2]
            best = Mount(point, fs_type, source)
    return best


def _ask(command: Sequence[str]) -> tuple[str, str]:
    """Return the output of a command, and why it is not complete."""
    if shutil.which(command[0]) is None:
        return "", f"no command {command[0]} here"
    asked = " ".join(command)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        # The exit status shows whether a quota is exceeded, not whether it was read.
        output, errors = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        # Wait no longer: a process that waits for a dead server cannot be killed.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=1.0)
        return "", f"{asked}: no answer after {TIMEOUT_S:g} s"
    if not output.strip() and (errors.strip() or process.returncode):
        return "", f"{asked}: {(errors.strip() or f'exit status {process.returncode}').splitlines()[0]}"
    return output, ""


def _left(whose: str, fields: Sequence[str]) -> Quota:
    used, soft, hard = (_number(word) for word in fields[0:3])
    used_files, soft_files, hard_files = (_number(word) for word in fields[4:7])
    # A soft limit may be exceeded for a while, so it counts only without a hard limit.
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
