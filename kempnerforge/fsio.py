"""The few file system operations that durability rests on.

POSIX promises that ``rename`` is atomic, and nothing about when a file's bytes or a folder's entries reach
the disk. So a name that others may look for appears only by rename, after the fsync of what it names, and
counts as durable only after the fsync of its parent folder.

All files and folders are made here, because new ones take the group permissions of their folder: on a shared
cluster a group goes on with a run that one of them began, whatever that one's umask is.
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

_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""What ``fsync`` of a folder says on file systems that have none."""
_DELETE_TRIES = 3
_DELETE_PAUSE_S = 0.05
_MAX_NAMES = 10_000

_unsynced: set[int] = set()
"""Devices whose folders cannot be synced and that the user has been told of."""


def fsync_folder(folder: Path) -> None:
    """Make the entries of ``folder`` (creations, renames, unlinks) durable.

    On a file system that cannot sync folders this logs one warning a file system, and returns.
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
    """Make ``folder``, and those above it that are missing. Their names are durable on return.

    So is the name of the lowest one that was there: who made it may have been killed before its sync.
    """
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    try:
        fsync_folder(folder.parent)
    except OSError as error:
        # It may not be listed.
        if error.errno not in (errno.EACCES, errno.EPERM):
            raise
    for one in reversed(missing):
        with contextlib.suppress(FileExistsError):
            new_folder(one)
        if not one.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(one))
        fsync_folder(one.parent)


def new_folder(folder: Path) -> None:
    """Make a folder that does not exist yet in one that does, with the group permissions of that one.

    Its name is not durable yet. Raises FileExistsError.
    """
    folder.mkdir()
    _share_with_group(folder, os.stat(folder), folder.parent)


def open_file(path: Path, flags: int) -> int:
    """A descriptor of ``path``, which is made, with the group permissions of its folder, if it is missing.

    ``flags`` as for ``os.open``; O_CREAT and O_CLOEXEC are added. With O_EXCL it must be missing.

    Raises OSError, also for a symbolic link and for what is not a regular file: whoever may write to a shared
    folder must not choose which file is written, or make the open wait.
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
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # a link; a pipe that nobody reads, a socket
            raise
        kind = "symbolic link" if error.errno == errno.ELOOP else "pipe"
        raise OSError(error.errno, f"is a {kind}, which is not {verb}", str(path)) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return fd


def open_to_read(path: Path) -> int:
    """A descriptor to read ``path`` with.

    Raises OSError, also for a symbolic link and for what is not a regular file: whoever may write to a shared
    folder must not choose which file is read, or make the open wait.
    """
    return _open_existing(path, os.O_RDONLY | os.O_CLOEXEC, "read")


def read_file(path: Path) -> bytes:
    """All bytes of a file in a folder that others may write to. Raises OSError as ``open_to_read`` does."""
    with os.fdopen(open_to_read(path), "rb") as file:
        return file.read()


def read_mark(path: Path, max_bytes: int = -1) -> bytes:
    """The first bytes of a file whose name alone says something: of a link, a pipe or a folder, none.

    Raises OSError for any other failure.
    """
    try:
        with os.fdopen(open_to_read(path), "rb") as file:
            return file.read(max_bytes)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EINVAL):
            raise
        return b""


def _share_with_group(made: int | Path, found: os.stat_result, folder: Path) -> None:
    """Give what was just made in ``folder`` the group permissions of ``folder``; files stay not executable.

    Only when both are of one group: else the permissions meant for that group would be given to another one,
    the user's own. The system passes a folder's group on where the folder is setgid, setgid bit included.
    Never an error: some network file systems know no modes.
    """
    with contextlib.suppress(OSError):
        above = os.stat(folder)
        bits = stat.S_IRWXG if stat.S_ISDIR(found.st_mode) else stat.S_IRGRP | stat.S_IWGRP
        mode = stat.S_IMODE(found.st_mode) & ~stat.S_IRWXG | above.st_mode & bits
        if found.st_gid == above.st_gid and mode != stat.S_IMODE(found.st_mode) and not _has_acl(folder):
            os.chmod(made, mode)


def _has_acl(folder: Path) -> bool:
    """Whether an access control list says what new files in ``folder`` get; the system does as it says."""
    try:
        return bool(os.getxattr(folder, "system.posix_acl_default"))
    except OSError:
        return False


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte of ``data``, going on after short writes."""
    view = memoryview(data).cast("B")
    while view.nbytes:
        written = os.write(fd, view)
        if written == 0:
            raise OSError(errno.EIO, "write() wrote nothing")
        view = view[written:]


def write_new_file(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a file that does not exist yet and fsync it. The entry in its folder is not durable yet.

    ``private``: nobody but the user may read it.
    """
    flags = os.O_WRONLY | os.O_EXCL
    fd = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, 0o600) if private else open_file(path, flags)
    try:
        write_all(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: Path, data: bytes, *, private: bool = False) -> None:
    """Replace ``path`` so that a reader, or a crash at any instant, finds the old bytes or the new ones.

    ``private``: nobody but the user may read it.
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
    """Remove what a kill in the middle of replacing ``path`` left beside it. For the one writer only.

    Raises the first OSError when all that can be removed is removed.
    """
    remove_all(list(path.parent.glob(f".{path.name}.*.tmp")))


def remove_all(paths: Sequence[Path]) -> None:
    """Remove the files ``paths``, those that are gone apart. Raises the first OSError after the last one."""
    failed: OSError | None = None
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            failed = failed or error
    if failed is not None:
        raise failed


def append_line(path: Path, line: str) -> None:
    """Append one whole line durably, in one write, so that a crash can tear at most the last line.

    A torn last line of an earlier crash is closed first, so that it never merges with the new one.
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
    """Give a finished folder its final name and make that durable. This is the commit.

    Raises FileExistsError when the name is taken: a committed folder is never replaced. After another OSError
    the folder has its old name again, as far as the file system lets it: what failed must not be found.
    """
    if final.exists() or final.is_symlink():
        raise FileExistsError(errno.EEXIST, "a committed folder is never replaced", str(final))
    folder = temporary.stat()
    try:
        os.rename(temporary, final)
        fsync_folder(final.parent)
    except OSError:
        # By its inode: another process may have taken the name, and a rename may be done and yet fail.
        with contextlib.suppress(OSError):
            if os.path.samestat(folder, final.lstat()):
                os.rename(final, temporary)
                fsync_folder(final.parent)
        raise


def point_symlink(link: Path, target: str) -> None:
    """Point ``link`` at ``target`` atomically, replacing an older link.

    Raises FileExistsError when ``link`` is there and is not a link, and OSError; neither changes anything.
    """
    if os.path.lexists(link) and not link.is_symlink():
        raise FileExistsError(errno.EEXIST, "is there and is not a link, so it is left as it is", str(link))
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
    """Delete a folder so that no crash leaves a half-deleted one under its name.

    The rename to a hidden name comes first and is durable before the first file goes. Raises OSError.
    """
    doomed = free_deleting_path(folder)
    os.rename(folder, doomed)
    fsync_folder(folder.parent)
    delete_tree(doomed)


def delete_tree(folder: Path) -> None:
    """Delete a folder that no one looks for any more; another process may be deleting it too.

    Raises OSError after a few tries, when all that can be deleted is gone: an entry may stay, as an open file
    does on NFS. A folder in which a file system is mounted is left whole: what is in that one is not ours.
    """
    failures: list[OSError] = []
    for _ in range(_DELETE_TRIES):
        if _is_gone(folder):
            return
        _require_no_mounts(folder)
        failures.clear()
        _delete_what_goes(folder, failures.append)
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


def _delete_what_goes(folder: Path, failed: Callable[[OSError], None]) -> None:
    """Delete what can be deleted. ``failed`` is told what cannot, but for what is gone already."""

    def tell(error: BaseException) -> None:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            failed(error)

    if sys.version_info >= (3, 12):
        shutil.rmtree(folder, onexc=lambda _function, _path, error: tell(error))
    else:
        shutil.rmtree(folder, onerror=lambda _function, _path, info: tell(info[1]))


def _require_no_mounts(folder: Path) -> None:
    """Raise OSError (EBUSY) when a file system is mounted on ``folder`` or below it."""
    try:
        listing = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except OSError:  # no proc file system: deletions stop at a mount point themselves, with EBUSY
        return
    real = os.path.realpath(folder)
    for line in listing.splitlines():
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), line.split(" ")[4])
        if point == real or point.startswith(real + "/"):
            raise OSError(errno.EBUSY, f"a file system is mounted at {point}", str(folder))


def deleting_name(name: str) -> str:
    """The hidden name that a folder has while it is being deleted."""
    return f".{name.lstrip('.')}.deleting"


def free_deleting_path(folder: Path) -> Path:
    """Where to rename ``folder`` to delete it: an earlier deletion of that name may not have got to its end.

    Raises OSError.
    """
    stem = folder.name.lstrip(".")
    for number in range(1, _MAX_NAMES):
        path = folder.with_name(deleting_name(stem if number == 1 else f"{stem}.{number}"))
        if _is_gone(path):
            return path
    raise FileExistsError(errno.EEXIST, f"{_MAX_NAMES} deletions of it were cut off", str(folder))


def read_range(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill ``buffer`` from ``offset``; returns the bytes read, fewer only at the end of the file."""
    done = 0
    while done < buffer.nbytes:
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def read_scattered(fd: int, buffers: Sequence[memoryview], offset: int) -> bool:
    """Fill all ``buffers`` from ``offset`` on; False when the file ends before."""
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
