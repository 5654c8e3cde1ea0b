"""Write and read files with a digest for every 16 MiB block.

A reader gets no bytes of a block before the digest of the whole block is verified. So to return
1 KB, the whole block is read.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import xxhash

from kempnerforge import fsio
from kempnerforge.errors import DamagedCheckpointError

BLOCK_BYTES = 16 << 20
_GROUP_BYTES = 1 << 20
_GROUP_BUFFERS = 1024
"""The most buffers that one system call may scatter to."""


class FileRecord(NamedTuple):
    """The manifest's entry for one file."""

    size_bytes: int
    xxh3_128: tuple[str, ...]
    """Hex digest of every 16 MiB block, in order."""


def record_of(data: bytes) -> FileRecord:
    """Return the record of a file with the content ``data``."""
    digester = BlockDigester()
    digester.update(memoryview(data))
    return digester.finish()


class BlockDigester:
    """Digests a stream of bytes block by block."""

    def __init__(self) -> None:
        self._size_bytes = 0
        self._digests: list[str] = []
        self._block = xxhash.xxh3_128()

    def update(self, data: memoryview) -> None:
        """Add the next bytes."""
        data = data.cast("B")
        while data.nbytes:
            room = BLOCK_BYTES - self._size_bytes % BLOCK_BYTES
            part = data[:room]
            self._block.update(part)
            self._size_bytes += part.nbytes
            if self._size_bytes % BLOCK_BYTES == 0:
                self._digests.append(self._block.hexdigest())
                self._block.reset()
            data = data[room:]

    def finish(self) -> FileRecord:
        """Return the record of all bytes so far."""
        digests = list(self._digests)
        if self._size_bytes % BLOCK_BYTES:
            digests.append(self._block.hexdigest())
        return FileRecord(self._size_bytes, tuple(digests))


class DigestingFile:
    """A new file that is digested while it is written."""

    def __init__(self, path: Path) -> None:
        self._fd = fsio.open_file(path, os.O_WRONLY | os.O_EXCL)
        self._digester = BlockDigester()

    def write(self, data: memoryview) -> None:
        """Append ``data``; the system calls and the digest release the interpreter lock."""
        self._digester.update(data)
        fsio.write_all(self._fd, data)

    def finish(self) -> FileRecord:
        """Call fsync and return the record. The file's name is durable only once its folder is synced."""
        os.fsync(self._fd)
        return self._digester.finish()

    def close(self) -> None:
        """Close the file. Does not sync it."""
        os.close(self._fd)


class VerifiedFile:
    """A file of a checkpoint that returns only bytes of blocks whose digest matches the manifest.

    Raises DamagedCheckpointError if a block is wrong on a second read too, and OSError.

    Args:
        path: the file.
        record: its entry in the manifest.
        keep: keep in memory every block that was read, for random access.
        buffer: ``BLOCK_BYTES`` of memory. Files that are read one after another may share it,
            because reading into fresh pages takes twice as long.
    """

    def __init__(
        self, path: Path, record: FileRecord, *, keep: bool = False, buffer: memoryview | None = None
    ) -> None:
        self.path = path
        self.record = record
        self._kept: dict[int, memoryview] | None = {} if keep else None
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # Close it even if no caller does: readers are passed around, and descriptors are limited.
        self._close = weakref.finalize(self, os.close, self._fd)
        self._buffer = buffer
        self._loaded: tuple[int, memoryview] | None = None

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        self._close()

    def __enter__(self) -> VerifiedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def block(self, number: int) -> memoryview:
        """Return the verified bytes of one block, valid until the next call."""
        if self._loaded is not None and self._loaded[0] == number:
            return self._loaded[1]
        if self._kept is not None:
            if number in self._kept:
                return self._kept[number]
            self._buffer = None
        self._loaded = None
        for again in (False, True):
            view = self._read_block(number, drop_cache=again)
            if xxhash.xxh3_128_hexdigest(view) == self.record.xxh3_128[number]:
                self._loaded = (number, view)
                if self._kept is not None:
                    self._kept[number] = view
                return view
        begin = number * BLOCK_BYTES
        raise DamagedCheckpointError(
            f"{self.path.parent.name} is damaged: {self.path.name} has a wrong digest in bytes "
            f"{begin} to {begin + view.nbytes}, on a second read too"
        )

    def _read_block(self, number: int, *, drop_cache: bool) -> memoryview:
        begin = number * BLOCK_BYTES
        want = min(BLOCK_BYTES, self.record.size_bytes - begin)
        if drop_cache:
            # A bit may have flipped in the page cache while the file is intact: read from the device again.
            os.posix_fadvise(self._fd, begin, want, os.POSIX_FADV_DONTNEED)
        if self._buffer is None:
            self._buffer = memoryview(bytearray(min(BLOCK_BYTES, self.record.size_bytes)))
        got = fsio.read_range(self._fd, self._buffer[:want], begin)
        return self._buffer[:got]

    def view(self, begin: int, end: int) -> memoryview:
        """Return verified bytes ``begin`` to ``end``, without a copy if they lie in one block."""
        number, offset = divmod(begin, BLOCK_BYTES)
        if 0 <= begin < end <= self.record.size_bytes and offset + end - begin <= BLOCK_BYTES:
            return self.block(number)[offset : offset + end - begin]
        return memoryview(self.read(begin, end))

    def read(self, begin: int, end: int) -> bytes:
        """Return verified bytes ``begin`` to ``end``."""
        return b"".join(bytes(part) for part in self.parts(begin, end))

    def parts(self, begin: int, end: int) -> Iterator[memoryview]:
        """Yield verified bytes ``begin`` to ``end`` in pieces, each valid until the next."""
        self._check_range(begin, end)
        while begin < end:
            number, offset = divmod(begin, BLOCK_BYTES)
            part = self.block(number)[offset : offset + end - begin]
            yield part
            begin += part.nbytes

    def read_into(self, pieces: Iterable[tuple[int, memoryview]]) -> None:
        """Fill each piece (offset in the file, memory) with verified bytes, in the order of the file.

        If pieces tile a block, it is read straight into them and digested there, which saves a
        copy. If this raises, do not use their content.
        """
        for number, parts in self._by_block(sorted(pieces, key=lambda piece: piece[0])).items():
            if self._read_straight(number, parts):
                continue
            block, start = self.block(number), number * BLOCK_BYTES
            for begin, memory in parts:
                memory[:] = block[begin - start : begin - start + memory.nbytes]

    def _by_block(self, pieces: Iterable[tuple[int, memoryview]]) -> dict[int, list[tuple[int, memoryview]]]:
        found: dict[int, list[tuple[int, memoryview]]] = {}
        for begin, memory in pieces:
            self._check_range(begin, begin + memory.nbytes)
            while memory.nbytes:
                number, offset = divmod(begin, BLOCK_BYTES)
                part = memory[: BLOCK_BYTES - offset]
                found.setdefault(number, []).append((begin, part))
                begin, memory = begin + part.nbytes, memory[part.nbytes :]
        return found

    def _read_straight(self, number: int, parts: Sequence[tuple[int, memoryview]]) -> bool:
        """Read a block into the pieces that tile it.

        Return False if they do not, or if its digest is wrong.
        """
        offset = number * BLOCK_BYTES
        end = min(offset + BLOCK_BYTES, self.record.size_bytes)
        if self._loaded is not None and self._loaded[0] == number:
            return False
        for begin, memory in parts:
            if begin != offset:
                return False
            offset += memory.nbytes
        if offset != end:
            return False
        digester, offset = xxhash.xxh3_128(), number * BLOCK_BYTES
        for group in _groups([memory for _, memory in parts]):
            if not fsio.read_scattered(self._fd, group, offset):
                return False
            for memory in group:
                digester.update(memory)
                offset += memory.nbytes
        return digester.hexdigest() == self.record.xxh3_128[number]

    def _check_range(self, begin: int, end: int) -> None:
        if not 0 <= begin <= end <= self.record.size_bytes:
            raise DamagedCheckpointError(
                f"{self.path.parent.name} is damaged: bytes {begin} to {end} of {self.path.name} lie outside "
                f"its {self.record.size_bytes} bytes"
            )


def _groups(buffers: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """Yield ``buffers`` split and combined into groups that are still in the cache when they are digested."""
    group: list[memoryview] = []
    room = _GROUP_BYTES
    for buffer in buffers:
        while buffer.nbytes:
            part = buffer[:room]
            group.append(part)
            buffer, room = buffer[part.nbytes :], room - part.nbytes
            if not room or len(group) == _GROUP_BUFFERS:
                yield group
                group, room = [], _GROUP_BYTES
    if group:
        yield group
