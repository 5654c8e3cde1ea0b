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
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path


def fsync_folder(folder: Path) -> None:
    """Make the entries of ``folder`` (creations, renames, unlinks) durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
        # It may not be listed, or is of a file system that syncs no folders.
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL):
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


def _open_existing(path: Path, flags: int) -> int:
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):  # a link; a pipe that nobody reads
            raise
        kind = "symbolic link" if error.errno == errno.ELOOP else "pipe"
        raise OSError(error.errno, f"is a {kind}, which is not written to", str(path)) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return fd


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
    """Remove what a kill in the middle of replacing ``path`` left beside it. For the one writer only."""
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)


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
    """Point ``link`` at ``target`` atomically, replacing an older link."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    os.symlink(target, temporary)
    os.replace(temporary, link)
    fsync_folder(link.parent)


def invalidate_then_delete(folder: Path) -> None:
    """Delete a folder so that no crash leaves a half-deleted one under its name.

    The rename to a hidden name comes first and is durable before the first file goes.
    """
    doomed = folder.with_name(deleting_name(folder.name))
    os.rename(folder, doomed)
    fsync_folder(folder.parent)
    delete_tree(doomed)


def delete_tree(folder: Path) -> None:
    """Delete a folder that no one looks for any more; another process may be deleting it too."""
    while folder.exists():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)


def deleting_name(name: str) -> str:
    """The hidden name that a folder has while it is being deleted."""
    return f".{name.lstrip('.')}.deleting"


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
