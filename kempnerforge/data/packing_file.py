"""Packings on disk: computed once, named by a digest of what they depend on, mapped by all ranks.

``packing-KEY.bin`` in ``data.cache_dir`` is one line of JSON, padded with spaces to HEADER_BYTES, and
the arrays of :class:`~kempnerforge.data.packing.Packing`, little-endian: ``first_piece``, ``starts``,
``lengths``. This module does not import torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kempnerforge.data.index import json_digest
from kempnerforge.data.packing import ALGORITHM, Packing, pack_documents
from kempnerforge.errors import DataError
from kempnerforge.fsio import fsync_folder, make_folder, open_file, write_all

log = logging.getLogger(__name__)

FORMAT = 1
HEADER_BYTES = 256
ABANDONED_AFTER_S = 24 * 3600.0
"""A temporary file without a write for this long was left by a killed process."""


@dataclass(frozen=True)
class PackingFile:
    """The stored packing of one split. Its name says which documents and ``seq_len`` it is for."""

    path: Path
    key: str

    @classmethod
    def of(
        cls, folder: Path, *, dataset: str, ends: Sequence[str | None], split: str, seq_len: int
    ) -> PackingFile:
        """Return the file in ``folder``. ``dataset`` and ``ends``, one for each shard, are digests."""
        key = json_digest(
            {
                "format": FORMAT,
                "algorithm": ALGORITHM,
                "dataset": dataset,
                "ends": ends,
                "split": split,
                "seq_len": seq_len,
            }
        )
        return cls(folder / f"packing-{key}.bin", key)

    def open_or_make(self, ends: Callable[[], np.ndarray], seq_len: int) -> Packing:
        """Return the packing after a check of its digest. Make it if it does not exist or is damaged.

        ``ends`` returns what ``pack_documents`` takes. Several processes may call this at once: each
        publishes the same bytes, atomically.

        Raises :class:`DataError` if the file cannot be written.
        """
        if os.path.lexists(self.path):
            try:
                return self.open(verify=True)
            except DataError as error:
                log.warning("%s; it is made again", error)
        try:
            make_folder(self.path.parent)
            self._remove_abandoned()
            self._write(pack_documents(ends(), seq_len))
        except OSError as error:
            raise DataError(
                f"cannot write the packing {self.path}: {error.strerror or error}; "
                "set data.cache_dir to a writable folder with enough free space"
            ) from error
        return self.open(verify=True)

    def open(self, *, verify: bool = False) -> Packing:
        """Map the packing, which another process has made. With ``verify``, check its digest.

        Raises :class:`DataError` if it does not exist, is damaged or cannot be read.
        """
        try:
            content = np.memmap(self.path, dtype=np.uint8, mode="r")
        except FileNotFoundError as error:
            raise DataError(
                f"{self.path}: no such file here, although rank 0 has made it; "
                "set data.cache_dir to a folder that all nodes share"
            ) from error
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise DataError(f"{self.path}: cannot be read: {error}") from error
        try:
            header = json.loads(content[:HEADER_BYTES].tobytes())
            num_rows, num_pieces = int(header["rows"]), int(header["pieces"])
            sizes = (8 * (num_rows + 1), 8 * num_pieces, 4 * num_pieces)
            sound = header["key"] == self.key and content.size == HEADER_BYTES + sum(sizes)
            first_piece, starts, lengths = np.split(content[HEADER_BYTES:], np.cumsum(sizes)[:-1])
            packing = Packing(
                first_piece.view("<u8"), starts.view("<u8"), lengths.view("<u4"), int(header["targets"])
            )
            if not sound or (verify and _digest(packing) != header["digest"]):
                raise ValueError("its size or its digest does not match")
        except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: damaged ({error})") from error
        return packing

    def _write(self, packing: Packing) -> None:
        header: dict[str, Any] = {
            "key": self.key,
            "rows": packing.num_rows,
            "pieces": packing.starts.size,
            "targets": packing.num_targets,
            "digest": _digest(packing),
        }
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
        fd = open_file(temporary, os.O_WRONLY | os.O_EXCL)
        try:
            try:
                write_all(fd, json.dumps(header).encode().ljust(HEADER_BYTES))
                for data in _arrays(packing):
                    write_all(fd, data)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(temporary, self.path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(self.path.parent)

    def _remove_abandoned(self) -> None:
        for temporary in self.path.parent.glob(f".{self.path.name}.*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # its writer has just published it
                if time.time() - temporary.stat().st_mtime > ABANDONED_AFTER_S:
                    temporary.unlink()


def _arrays(packing: Packing) -> list[memoryview]:
    arrays = (packing.first_piece, packing.starts, packing.lengths)
    return [np.ascontiguousarray(array).data.cast("B") for array in arrays]


def _digest(packing: Packing) -> str:
    digest = xxhash.xxh3_128()
    for data in _arrays(packing):
        digest.update(data)
    return digest.hexdigest()
