"""Puts a watcher between this process and its file system.

Production code has no hooks for this. ``install`` replaces functions of ``os`` in a rank's process,
and ``startup/sitecustomize.py`` does so in the processes that the rank starts, such as its writer.
An audit hook detects operations that bypassed the replaced functions. Reading such a recording
fails, because it is incomplete. This module uses the standard library only, because the writer
process has no torch.
"""

from __future__ import annotations

import errno
import json
import os
import shutil  # noqa: F401 - it reads os.unlink when it is imported, and must get the real function
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.crash.file_watcher import REAL, WRITES, Watch, Watcher

VARIABLE = "KEMPNERFORGE_TEST_FILEOPS"

_NOT_WATCHED = ("writev", "pwritev", "sendfile", "copy_file_range", "posix_fallocate", "mkfifo", "mknod")
_PATHS = [str(Path(__file__).with_name("startup")), str(Path(__file__).parents[2])]
"""Folders of ``startup/sitecustomize.py`` and of this package."""
_AUDITED = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate")

_watcher: Watcher | None = None


def install(watch: Watch) -> None:
    """Watch this process and the Python processes that it starts from now on."""
    global _watcher
    assert _watcher is None, "one watch at a time"
    _watcher = Watcher(watch)
    os.environ[VARIABLE] = json.dumps(vars(watch))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(_PATHS if before is None else [*_PATHS, before])
    for name, function in _replacements(_watcher).items():
        setattr(os, name, function)
    _hook_once()


def uninstall() -> None:
    """Stop watching this process."""
    global _watcher
    _watcher = None
    for name in _REPLACED:
        setattr(os, name, REAL[name])
    del os.environ[VARIABLE]
    before = os.environ.pop("PYTHONPATH").split(os.pathsep)[len(_PATHS) :]
    if before:
        os.environ["PYTHONPATH"] = os.pathsep.join(before)


def install_from_environment() -> None:
    """Watch this process if its parent is watched."""
    if VARIABLE in os.environ:
        above = Watch(**json.loads(os.environ[VARIABLE]))
        role = above.role.replace("rank", "writer")
        install(Watch(**{**vars(above), "role": role}))


_REPLACED = (
    *("open", "write", "pwrite", "fsync", "fdatasync", "ftruncate", "rename", "replace", "unlink", "remove"),
    *("mkdir", "rmdir", "symlink", "link", *_NOT_WATCHED),
)


def _replacements(watcher: Watcher) -> dict[str, Callable[..., Any]]:
    made: dict[str, Callable[..., Any]] = {"open": _open(watcher)}
    for name in WRITES:
        made[name] = _write(watcher, name)
    for name in ("fsync", "fdatasync", "ftruncate"):
        made[name] = _on_descriptor(watcher, name)
    for name in ("rename", "replace", "link"):
        made[name] = _two_paths(watcher, name)
    for name in ("unlink", "remove", "mkdir", "rmdir"):
        made[name] = _one_path(watcher, name)
    made["symlink"] = _symlink(watcher)
    for name in _NOT_WATCHED:
        made[name] = _blind(watcher, name)
    return made


def _open(watcher: Watcher) -> Callable[..., Any]:
    def call(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        relative = watcher.relative(path, dir_fd)
        if relative is None or not flags & (os.O_CREAT | os.O_TRUNC):
            return REAL["open"](path, flags, mode, dir_fd=dir_fd)
        refused = watcher.watch.no_direct and flags & os.O_DIRECT
        if refused:
            flags &= ~os.O_DIRECT
        existed = os.path.lexists(os.path.join(watcher.watch.root, relative))
        op = "truncate" if existed else "create"
        if existed and not flags & (os.O_TRUNC | os.O_EXCL):
            return REAL["open"](path, flags, mode, dir_fd=dir_fd)
        fd = watcher.perform(op, relative, lambda: REAL["open"](path, flags, mode, dir_fd=dir_fd), size=0)
        if refused:
            REAL["close"](fd)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), os.fspath(path))
        return fd

    return call


def _write(watcher: Watcher, name: str) -> Callable[..., Any]:
    def call(fd: int, data: Any, *offset: int) -> int:
        if watcher.of_fd(fd) is None:
            return REAL[name](fd, data, *offset)
        return watcher.write(name, fd, data, offset[0] if offset else None)

    return call


def _on_descriptor(watcher: Watcher, name: str) -> Callable[..., Any]:
    def call(fd: Any, *size: int) -> None:
        number = fd if isinstance(fd, int) else fd.fileno()
        path = watcher.of_fd(number)
        if path is None:
            return REAL[name](fd, *size)
        op = {"ftruncate": "truncate"}.get(name, "fsync")
        return watcher.perform(op, path, lambda: REAL[name](fd, *size), **({"size": size[0]} if size else {}))

    return call


def _one_path(watcher: Watcher, name: str) -> Callable[..., Any]:
    def call(path: Any, *mode: int, dir_fd: int | None = None) -> None:
        relative = watcher.relative(path, dir_fd)
        if relative is None:
            return REAL[name](path, *mode, dir_fd=dir_fd)
        op = {"remove": "unlink"}.get(name, name)
        return watcher.perform(op, relative, lambda: REAL[name](path, *mode, dir_fd=dir_fd))

    return call


def _two_paths(watcher: Watcher, name: str) -> Callable[..., Any]:
    def call(source: Any, target: Any, **options: Any) -> None:
        from_path = watcher.relative(source, options.get("src_dir_fd"))
        to_path = watcher.relative(target, options.get("dst_dir_fd"))
        if from_path is None and to_path is None:
            return REAL[name](source, target, **options)
        if from_path is None or to_path is None:
            watcher.log("blind", f"{name} {source} {target}")
            return REAL[name](source, target, **options)
        op = {"replace": "rename"}.get(name, name)
        return watcher.perform(op, from_path, lambda: REAL[name](source, target, **options), to=to_path)

    return call


def _symlink(watcher: Watcher) -> Callable[..., Any]:
    def call(target: Any, path: Any, *args: Any, dir_fd: int | None = None) -> None:
        relative = watcher.relative(path, dir_fd)
        if relative is None:
            return REAL["symlink"](target, path, *args, dir_fd=dir_fd)
        work = lambda: REAL["symlink"](target, path, *args, dir_fd=dir_fd)  # noqa: E731
        return watcher.perform("symlink", relative, work, to=os.fsdecode(target))

    return call


def _blind(watcher: Watcher, name: str) -> Callable[..., Any]:
    def call(first: Any, *args: Any, **options: Any) -> Any:
        path = watcher.of_fd(first) if isinstance(first, int) else watcher.relative(first)
        if path is not None:
            watcher.log("blind", f"{name} {path}")
        return REAL[name](first, *args, **options)

    return call


_hooked = False


def _hook_once() -> None:
    """Install the audit hook once. It cannot be removed, so it serves whichever watcher is installed."""
    global _hooked
    if not _hooked:
        _hooked = True
        sys.addaudithook(_audit)


def _audit(event: str, args: tuple[Any, ...]) -> None:
    watcher = _watcher
    if watcher is None or getattr(watcher.inside, "depth", 0):
        return
    if event == "open":
        path, mode, flags = args
        # Without a mode it is os.open, which is replaced. With one, it is open() or a related
        # function.
        changes = mode is not None and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if changes and watcher.relative(path) is not None:
            watcher.log("blind", f"open {path}")
    elif event in _AUDITED and any(watcher.relative(arg) is not None for arg in args[:2]):
        watcher.log("blind", f"{event} {args}")
