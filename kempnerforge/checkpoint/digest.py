"""Files with a digest for every 16 MiB block, written and read.

A block is the unit of trust: a reader that needs 1 KB reads the block that holds it, and no byte reaches its
caller before the block's digest was right.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from kempnerforge import fsio
from kempnerforge.errors import DamagedCheckpointError

BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of one file."""

    size_bytes: int
    xxh3_128: tuple[str, ...]
    """Hex digest of every 16 MiB block, in order."""


def record_of(data: bytes) -> FileRecord:
    """The record of a file that holds ``data``."""
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
        """The record of all bytes so far."""
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
        """fsync; the file's bytes are durable on return (its name is when its folder was synced)."""
        os.fsync(self._fd)
        return self._digester.finish()

    def close(self) -> None:
        """Close without a promise."""
        os.close(self._fd)


class VerifiedFile:
    """A file of a checkpoint that gives out only bytes whose block has the digest of the manifest.

    Raises DamagedCheckpointError when a block is wrong on a second read too, and OSError as it comes.
    """

    def __init__(self, path: Path, record: FileRecord) -> None:
        self.path = path
        self.record = record
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        # Also when nobody closes it: readers are handed around, and descriptors are few.
        self._close = weakref.finalize(self, os.close, self._fd)
        self._buffer = memoryview(bytearray(min(BLOCK_BYTES, record.size_bytes)))
        self._loaded: tuple[int, memoryview] | None = None

    def close(self) -> None:
        """Release the file. Does nothing the second time."""
        self._close()

    def __enter__(self) -> VerifiedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def block(self, number: int) -> memoryview:
        """Verified bytes of one block; valid until the next call."""
        if self._loaded is not None and self._loaded[0] == number:
            return self._loaded[1]
        self._loaded = None
        for again in (False, True):
            view = self._read_block(number, drop_cache=again)
            if xxhash.xxh3_128_hexdigest(view) == self.record.xxh3_128[number]:
                self._loaded = (number, view)
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
            # A bit that flipped in memory must not condemn a sound file: ask the device again.
            os.posix_fadvise(self._fd, begin, want, os.POSIX_FADV_DONTNEED)
        got = fsio.read_range(self._fd, self._buffer[:want], begin)
        return self._buffer[:got]

    def read(self, begin: int, end: int) -> bytes:
        """Verified bytes ``begin`` to ``end``."""
        return b"".join(bytes(part) for part in self.parts(begin, end))

    def parts(self, begin: int, end: int) -> Iterator[memoryview]:
        """Verified bytes ``begin`` to ``end`` in pieces, each valid until the next."""
        if not 0 <= begin <= end <= self.record.size_bytes:
            raise DamagedCheckpointError(
                f"{self.path.parent.name} is damaged: bytes {begin} to {end} of {self.path.name} lie outside "
                f"its {self.record.size_bytes} bytes"
            )
        while begin < end:
            number, offset = divmod(begin, BLOCK_BYTES)
            part = self.block(number)[offset : offset + end - begin]
            yield part
            begin += part.nbytes
