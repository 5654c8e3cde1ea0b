"""Map memory that the trainer and its writer process share, in huge pages where the system allows it.

The memory is a memfd. A direct write pins every page of its block, and so does registering memory
with CUDA. With 4 KiB pages that takes more processor time than computing the digests.
``MADV_COLLAPSE`` (Linux 6.1) makes huge pages once, regardless of ``shmem_enabled``. If the kernel
refuses it, or memory is too fragmented, small pages work the same way.

This is not part of ``host_buffers``, which needs torch: the writer process imports this module.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

HUGE_BYTES = 2 << 20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_MAP_FIXED = 0x10
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_NO_ACCESS = 0
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def map_new(fd: int, size_bytes: int) -> memoryview:
    """Map the first ``size_bytes`` of ``fd`` for writing, in huge pages if possible.

    The memory is unmapped when the last object that uses it is gone. All pages are allocated on
    return. If there is too little memory, raises OSError here, instead of a SIGBUS in a later copy.
    """
    memory = _map_aligned(fd, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE)
    address, whole = ctypes.addressof(memory), size_bytes // HUGE_BYTES * HUGE_BYTES
    if whole:
        _libc.madvise(address, whole, _MADV_HUGEPAGE)
        for begin in range(0, whole, HUGE_BYTES):
            os.posix_fallocate(fd, begin, 1)  # MADV_COLLAPSE skips a range without any page
        _libc.madvise(address, whole, _MADV_COLLAPSE)
    if size_bytes:
        os.posix_fallocate(fd, 0, size_bytes)
    return memoryview(memory).cast("B")


def map_filled(fd: int, size_bytes: int) -> memoryview:
    """Map the first ``size_bytes`` of ``fd``, which another process fills, for reading. Raises OSError."""
    return memoryview(_map_aligned(fd, size_bytes, mmap.PROT_READ)).cast("B").toreadonly()


def _map_aligned(fd: int, size_bytes: int, protection: int) -> ctypes.Array[ctypes.c_ubyte]:
    """Map at an address at which a huge page can begin. By itself the kernel would choose another one."""
    reserved_bytes = size_bytes + HUGE_BYTES
    reserved = _map(None, reserved_bytes, _NO_ACCESS, _ANONYMOUS, -1)
    begin = -(-reserved // HUGE_BYTES) * HUGE_BYTES
    try:
        _map(begin, size_bytes, protection, mmap.MAP_SHARED | _MAP_FIXED, fd)
    except OSError:
        _libc.munmap(reserved, reserved_bytes)
        raise
    memory = (ctypes.c_ubyte * size_bytes).from_address(begin)
    unmap = weakref.finalize(memory, _libc.munmap, reserved, reserved_bytes)
    unmap.atexit = False  # a thread may still copy into it
    return memory


def _map(address: int | None, size_bytes: int, protection: int, flags: int, fd: int) -> int:
    mapped = _libc.mmap(address, size_bytes, protection, flags, fd, 0)
    if mapped == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"mmap() of {size_bytes} bytes: {os.strerror(number)}")
    return mapped
