"""The changes of a folder that strace saw, in the format of a recording."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

_CALLS = (
    *("open", "openat", "openat2", "creat", "write", "pwrite64", "writev", "pwritev", "pwritev2"),
    *("fsync", "fdatasync", "sync_file_range", "ftruncate", "truncate", "fallocate", "copy_file_range"),
    *("sendfile", "splice", "io_submit", "io_uring_setup", "rename", "renameat", "renameat2", "unlink"),
    *("unlinkat", "mkdir", "mkdirat", "rmdir", "symlink", "symlinkat", "link", "linkat", "mknod", "mknodat"),
)
TRACE = [
    "-ff",
    "-f",
    "--seccomp-bpf",
    "-y",
    "-z",
    "-s",
    "0",
    "-qq",
    "-e",
    "signal=none",
    "-e",
    f"trace={','.join(_CALLS)}",
]
"""Options: one output file per process, successful calls only, descriptors with their paths, no data."""

_LINE = re.compile(r"(?P<call>\w+)\((?P<args>.*)\)\s+= (?P<result>.*)")
_OPS = {
    **dict.fromkeys(("write", "pwrite64"), "write"),
    **dict.fromkeys(("fsync", "fdatasync"), "fsync"),
    **dict.fromkeys(("rename", "renameat", "renameat2"), "rename"),
    **dict.fromkeys(("mkdir", "mkdirat"), "mkdir"),
    **dict.fromkeys(("symlink", "symlinkat"), "symlink"),
    "unlink": "unlink",
    "rmdir": "rmdir",
    "ftruncate": "truncate",
}


def changes_seen(traces: Path, root: Path) -> Counter[tuple[str, str]]:
    """Return counts of (operation, path below ``root``) of every call that changed or synced something there.

    ``root`` must be empty at the beginning. The first call that opens a file to append creates it.
    """
    found: Counter[tuple[str, str]] = Counter()
    for trace in traces.iterdir():
        for line in trace.read_text(errors="replace").splitlines():
            match = _LINE.match(line)
            if match and (seen := _change(match["call"], match["args"], root)):
                found[seen] += 1
    for operation, path in list(found):
        if operation == "append":
            del found[operation, path]
            found["create", path] = 1
    return found


def _change(call: str, args: str, root: Path) -> tuple[str, str] | None:
    paths = _paths(call, args)
    inside = [path for path in paths if path.startswith(f"{root}/") or path == str(root)]
    if not inside or (call == "mkdir" and inside[0] == str(root)):
        return None
    path = str(Path(inside[0]).relative_to(root))
    if call in ("open", "openat", "openat2"):
        if "O_CREAT" not in args:
            return None
        return ("create" if "O_EXCL" in args else "append", path)
    if call == "unlinkat":
        return ("rmdir" if "AT_REMOVEDIR" in args else "unlink", path)
    return (_OPS.get(call, call), path)


def _paths(call: str, args: str) -> list[str]:
    """Return the absolute paths that a call works on: the source of a rename, the name of a link."""
    if call in ("symlink", "symlinkat"):
        args = args.split(", ", 1)[1]
    if match := re.match(r'(?:AT_FDCWD|\d+)<([^>]*)>, "([^"]*)"', args):
        return [match[2] if match[2].startswith("/") else f"{match[1]}/{match[2]}"]
    if match := re.match(r'"([^"]*)"', args):
        return [match[1]]
    if match := re.match(r"\d+<([^>]*)>", args):
        return [match[1]]
    return []
