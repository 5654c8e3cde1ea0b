"""The file system operations on which durability depends.

POSIX guarantees that ``rename`` is atomic, but not when the bytes of a file or the entries of a
folder reach the disk. Therefore a name that readers look for is created only by rename, after the
fsync of its content, and it is durable only after the fsync of its parent folder.

The functions of this module create all files and folders of a run. They give each new entry the
group permissions of the folder that contains it. On a shared cluster, another member of the group
can then resume a run, whatever the umask of its creator is.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

GIT_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""The first bytes of the file that git leaves in place of one that git-lfs has not fetched."""

_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""Errors of ``fsync`` on folders of file systems that do not support it."""
_DELETE_TRIES = 3
_DELETE_PAUSE_S = 0.05
_MAX_NAMES = 10_000

_unsynced: set[int] = set()
"""Devices for which the warning that folders cannot be synced has been logged."""


def fsync_folder(folder: Path) -> None:
    """Make the entries of ``folder`` (creations, renames, unlinks) durable.

    On a file system that cannot sync folders, log a warning once and return.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
        _warn_unsynced(folder, os.fstat(fd).st_dev, error)
    finally:
        os.close(fd)


def _warn_unsynced(folder: Path, device: int, error: OSError) -> None:
    if device not in _unsynced:
        _unsynced.add(device)
        log.warning(
            "the file system of %s cannot sync folders (%s): a crash of its server may undo the last renames",
            folder,
            error.strerror,
        )


def make_folder(folder: Path) -> None:
    """Create ``folder`` and its missing parents. Their names are durable on return.

    The name of the lowest existing folder is made durable too, because its creator may have been
    killed before it synced the name.
    """
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    try:
        fsync_folder(folder.parent)
    except OSError as error:
        # The user may have no permission to open the parent folder.
        if error.errno not in (errno.EACCES, errno.EPERM):
            raise
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):
            new_folder(path)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        fsync_folder(path.parent)


def new_folder(folder: Path) -> None:
    """Create a folder in an existing one, with the group permissions of its parent.

    Its name is not durable yet. Raises FileExistsError.
    """
    folder.mkdir()
    _share_with_group(folder, os.stat(folder), folder.parent)


def open_file(path: Path, flags: int) -> int:
    """Open ``path`` and return its descriptor. A new file gets the group permissions of its folder.

    ``flags`` are those of ``os.open``. O_CREAT and O_CLOEXEC are added. With O_EXCL the file must
    not exist.

    Raises OSError, also for a symbolic link or anything else that is not a regular file. Otherwise,
    other users of a shared folder could choose which file is written, or block the open.
    """
    flags |= os.O_CREAT | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | os.O_EXCL, 0o666)
    except FileExistsError:
        if flags & os.O_EXCL:
            raise
        return _open_existing(path, flags)
    _share_with_group(fd, os.fstat(fd), path.parent)
    return fd


def _open_existing(path: Path, flags: int, verb: str = "written to") -> int:
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # a link; a pipe without a reader, or a socket
            raise
        kind = "symbolic link" if error.errno == errno.ELOOP else "pipe"
        raise OSError(error.errno, f"is a {kind}, which is not {verb}", str(path)) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return fd


def open_to_read(path: Path) -> int:
    """Open ``path`` for reading and return its descriptor.

    Raises OSError, also for a symbolic link or anything else that is not a regular file. Otherwise,
    other users of a shared folder could choose which file is read, or block the open.
    """
    return _open_existing(path, os.O_RDONLY | os.O_CLOEXEC, "read")


def read_file(path: Path) -> bytes:
    """Read a file in a folder that other users may write to. Raises OSError like ``open_to_read``."""
    with os.fdopen(open_to_read(path), "rb") as file:
        return file.read()


def read_mark(path: Path, max_bytes: int = -1) -> bytes:
    """Read the first bytes of a marker file. Return no bytes for a link, a pipe or a folder.

    Raises OSError for any other failure.
    """
    try:
        with os.fdopen(open_to_read(path), "rb") as file:
            return file.read(max_bytes)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EINVAL):
            raise
        return b""


def _share_with_group(created: int | Path, status: os.stat_result, folder: Path) -> None:
    """Give a new entry of ``folder`` the group permissions of ``folder``. Files do not become executable.

    Do nothing if their groups differ: the permissions would then be given to the user's own group.
    In a setgid folder, the kernel passes on the group and the setgid bit. Errors are ignored,
    because some network file systems do not support modes.
    """
    with contextlib.suppress(OSError):
        parent = os.stat(folder)
        bits = stat.S_IRWXG if stat.S_ISDIR(status.st_mode) else stat.S_IRGRP | stat.S_IWGRP
        mode = stat.S_IMODE(status.st_mode) & ~stat.S_IRWXG | parent.st_mode & bits
        if status.st_gid == parent.st_gid and mode != stat.S_IMODE(status.st_mode) and not _has_acl(folder):
            os.chmod(created, mode)


def _has_acl(folder: Path) -> bool:
    """Return whether ``folder`` has a default access control list, which the kernel applies to new files."""
    try:
        return bool(os.getxattr(folder, "system.posix_acl_default"))
    except OSError:
        return False


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte of ``data``, continuing after short writes."""
    view = memoryview(data).cast("B")
    while view.nbytes:
        written = os.write(fd, view)
        if written == 0:
            raise OSError(errno.EIO, "write() wrote nothing")
        view = view[written:]


def write_new_file(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a file that does not exist yet and fsync it. Its entry in the folder is not durable yet.

    With ``private``, only the user may read it.
    """
    flags = os.O_WRONLY | os.O_EXCL
    fd = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, 0o600) if private else open_file(path, flags)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: Path, data: bytes, *, private: bool = False) -> None:
    """Replace ``path`` so that readers find the old bytes or the new ones, also after a crash at any instant.

    With ``private``, only the user may read it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        write_new_file(temporary, data, private=private)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of a killed ``atomic_write`` of ``path``. Only its single writer may call this.

    Raises the first OSError after trying to remove all of them.
    """
    remove_all(list(path.parent.glob(f".{path.name}.*.tmp")))


def remove_all(paths: Sequence[Path]) -> None:
    """Remove those of ``paths`` that exist. Raises the first OSError after trying to remove all of them."""
    failed: OSError | None = None
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            failed = failed or error
    if failed is not None:
        raise failed


def append_line(path: Path, line: str) -> None:
    """Append a whole line durably, in one write, so that a crash can tear at most the last line.

    If an earlier crash has torn the last line, end it first, so that it never merges with the new
    one.
    """
    fd = open_file(path, os.O_RDWR | os.O_APPEND)
    try:
        size = os.fstat(fd).st_size
        torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        write_all(fd, (("\n" if torn else "") + line + "\n").encode())
        os.fsync(fd)
        if size == 0:
            fsync_folder(path.parent)
    finally:
        os.close(fd)


def publish(temporary: Path, final: Path) -> None:
    """Give a finished folder its final name and make it durable. This is the commit.

    Raises FileExistsError if the name is taken: a committed folder is never replaced. After any
    other OSError the folder is renamed back, if the file system permits it: readers must not find a
    failed commit.
    """
    if final.exists() or final.is_symlink():
        raise FileExistsError(errno.EEXIST, "a committed folder is never replaced", str(final))
    folder = temporary.stat()
    try:
        os.rename(temporary, final)
        fsync_folder(final.parent)
    except OSError:
        # Compare inodes: another process may have taken the name, and a rename can fail after it
        # was done.
        with contextlib.suppress(OSError):
            if os.path.samestat(folder, final.lstat()):
                os.rename(final, temporary)
                fsync_folder(final.parent)
        raise


def point_symlink(link: Path, target: str) -> None:
    """Point ``link`` at ``target`` atomically, replacing an older link.

    Raises FileExistsError if ``link`` exists and is not a link. Raises OSError for any other
    failure. Nothing has changed in either case.
    """
    if os.path.lexists(link) and not link.is_symlink():
        raise FileExistsError(errno.EEXIST, "exists and is not a link; it is not changed", str(link))
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.symlink(target, temporary)
        os.replace(temporary, link)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_folder(link.parent)


def invalidate_then_delete(folder: Path) -> None:
    """Delete a folder so that no crash leaves a partly deleted one under its name.

    Rename it to a hidden name durably before deleting the first file. Raises OSError.
    """
    doomed = free_deleting_path(folder)
    os.rename(folder, doomed)
    fsync_folder(folder.parent)
    delete_tree(doomed)


def delete_tree(folder: Path) -> None:
    """Delete a folder that readers no longer look for. Another process may be deleting it at the same time.

    Raises OSError if entries remain after a few tries, such as an open file on NFS. All other
    entries are deleted by then. A folder that contains a mount point is not changed, because the
    mounted file system belongs to others.
    """
    failures: list[OSError] = []
    for _ in range(_DELETE_TRIES):
        if _is_gone(folder):
            return
        _require_no_mounts(folder)
        failures.clear()
        _delete_what_is_possible(folder, failures.append)
        if _is_gone(folder):
            return
        time.sleep(_DELETE_PAUSE_S)
    raise failures[0] if failures else OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))


def _is_gone(path: Path) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return True
    return False


def _delete_what_is_possible(folder: Path, failed: Callable[[OSError], None]) -> None:
    """Delete everything that can be deleted. Call ``failed`` with each error but FileNotFoundError."""

    def report(error: BaseException) -> None:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            failed(error)

    if sys.version_info >= (3, 12):
        shutil.rmtree(folder, onexc=lambda _function, _path, error: report(error))
    else:
        shutil.rmtree(folder, onerror=lambda _function, _path, info: report(info[1]))


def _require_no_mounts(folder: Path) -> None:
    """Raise OSError (EBUSY) if a file system is mounted on ``folder`` or below it."""
    try:
        listing = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except OSError:  # without /proc, the deletion of a mount point fails with EBUSY
        return
    real = os.path.realpath(folder)
    for line in listing.splitlines():
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), line.split(" ")[4])
        if point == real or point.startswith(real + "/"):
            raise OSError(errno.EBUSY, f"a file system is mounted at {point}", str(folder))


def deleting_name(name: str) -> str:
    """Return the hidden name of a folder that is being deleted."""
    return f".{name.lstrip('.')}.deleting"


def free_deleting_path(folder: Path) -> Path:
    """Return an unused hidden path to which ``folder`` can be renamed before it is deleted.

    The usual name is taken if an earlier deletion is unfinished. Raises OSError.
    """
    stem = folder.name.lstrip(".")
    for number in range(1, _MAX_NAMES):
        path = folder.with_name(deleting_name(stem if number == 1 else f"{stem}.{number}"))
        if _is_gone(path):
            return path
    raise FileExistsError(errno.EEXIST, f"{_MAX_NAMES} deletions of it are unfinished", str(folder))


def read_range(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill ``buffer`` from ``offset``. Return the bytes read, which are fewer only at the end of the file."""
    done = 0
    while done < buffer.nbytes:
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def read_scattered(fd: int, buffers: Sequence[memoryview], offset: int) -> bool:
    """Fill all ``buffers`` in order, starting at ``offset``. Return False if the file is too short."""
    left = [buffer for buffer in buffers if buffer.nbytes]
    while left:
        count = os.preadv(fd, left, offset)
        if count == 0:
            return False
        offset += count
        while left and count >= left[0].nbytes:
            count -= left.pop(0).nbytes
        if left:
            left[0] = left[0][count:]
    return True
