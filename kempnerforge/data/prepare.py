"""Tokenise text into a prepared folder, which is written under a temporary name and then renamed.

See :mod:`kempnerforge.data.index` for its content. This module does not import torch.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kempnerforge.data.corpus import Corpus, read_document, scan_corpus
from kempnerforge.data.index import FORMAT, INDEX_NAME, Index, SplitEntry, json_digest
from kempnerforge.data.shard_writer import ShardWriter
from kempnerforge.data.tokenizer import BYTES, Tokenizer, token_dtype
from kempnerforge.data.train_val_split import DocumentPart, line_end_before, split_documents
from kempnerforge.errors import DataError
from kempnerforge.fsio import fsync_folder, make_folder, new_folder, publish, write_new_file

SHARD_TOKENS = 128 << 20
"""Tokens per shard."""

PIECE_BYTES = 256 << 10
"""Longer documents are tokenised in pieces, cut at line ends, because the time that a tokenizer
takes grows faster than linearly with the length of a text."""

BATCH_BYTES = 8 << 20
"""Bytes of text per call of the tokenizer, which processes the pieces in parallel."""

ABANDONED_AFTER_S = 24 * 3600.0
"""A temporary folder without a write for this long was left by a killed process."""

Progress = Callable[[int, int], None]
"""Called with the bytes of text that are done and the total."""


def prepare(
    text: str | Sequence[str],
    folder: Path,
    tokenizer: Tokenizer,
    *,
    val_fraction: float = 0.01,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress | None = None,
) -> Index:
    """Tokenise ``text`` (see :func:`~kempnerforge.data.corpus.scan_corpus`) into the new folder ``folder``.

    The folder appears complete or not at all. The tokenizer's separator follows every document.

    Raises :class:`DataError` if the text cannot be read, ``folder`` exists and is not empty, or it
    cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists and is not an empty folder; name another, or delete it first")
    corpus = scan_corpus(text)
    job = _Preparation(corpus, tokenizer, val_fraction, shard_tokens, progress)
    index = job.write_to(folder)
    if index is None:
        raise DataError(f"{folder} was created by another process in the meantime; name another folder")
    return index


def prepare_cached(
    text: str | Sequence[str],
    tokenizer: Tokenizer,
    cache_dir: Path,
    *,
    val_fraction: float = 0.01,
    progress: Progress | None = None,
) -> Path:
    """Return the prepared folder of ``text`` below ``cache_dir``; create it if it does not exist.

    Its name is a digest of every document's content, the tokenizer, ``val_fraction`` and the
    format, so changed text or another tokenizer gives another folder. Several processes may call
    this at once: all get the folder that was published first.

    Raises :class:`DataError` if the text cannot be read or the folder cannot be written.
    """
    corpus = scan_corpus(text)
    key = json_digest(
        {
            "format": FORMAT,
            "documents": [document.digest for document in corpus.documents],
            "tokenizer": tokenizer.digest,
            "val_fraction": val_fraction,
        }
    )
    folder = cache_dir / f"tokens-{key}"
    if not (folder / INDEX_NAME).is_file():
        _Preparation(corpus, tokenizer, val_fraction, SHARD_TOKENS, progress).write_to(folder)
    return folder


@dataclass(frozen=True)
class _Preparation:
    corpus: Corpus
    tokenizer: Tokenizer
    val_fraction: float
    shard_tokens: int
    progress: Progress | None

    def write_to(self, folder: Path) -> Index | None:
        """Write a temporary folder and publish it. Return None if another process published first."""
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
        try:
            make_folder(folder.parent)
            _remove_abandoned(folder)
            new_folder(temporary)
            try:
                index = self._write_splits(temporary)
                if self.tokenizer.name != BYTES:
                    for name, data in self.tokenizer.files().items():
                        write_new_file(temporary / name, data)
                write_new_file(temporary / INDEX_NAME, index.to_json())
                fsync_folder(temporary)
                published = _publish_first(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            raise DataError(
                f"cannot write prepared tokens to {folder}: {error.strerror or error}; "
                "set --out or data.cache_dir to a writable folder with enough free space"
            ) from error
        return index if published else None

    def _write_splits(self, folder: Path) -> Index:
        dtype = token_dtype(self.tokenizer.vocab_size)
        report = _Reporter(self.corpus.size_bytes, self.progress)
        splits: dict[str, SplitEntry] = {}
        num_not_utf8 = 0
        for name, parts in split_documents(self.corpus.documents, self.val_fraction).items():
            writer = ShardWriter(folder, name, dtype, self.shard_tokens)
            try:
                num_not_utf8 += self._write_parts(writer, parts, report)
                splits[name] = writer.close()
            finally:
                writer.abandon()
        return Index(
            dtype=dtype.name,
            vocab_size=self.tokenizer.vocab_size,
            separator_id=self.tokenizer.separator_id,
            tokenizer=self.tokenizer.name,
            tokenizer_digest=self.tokenizer.digest,
            val_fraction=self.val_fraction,
            num_empty=self.corpus.num_empty,
            num_binary=self.corpus.num_binary,
            num_not_utf8=num_not_utf8,
            splits=splits,
        )

    def _write_parts(self, writer: ShardWriter, parts: list[DocumentPart], report: _Reporter) -> int:
        """Tokenise ``parts``. Return how many of them have bytes that the tokenizer cannot read."""
        separator = np.array([self.tokenizer.separator_id])
        num_not_utf8 = 0
        broken = False
        for batch in _batches(_pieces(parts)):
            encoded = self.tokenizer.encode_batch([piece.content for piece in batch])
            for piece, ids in zip(batch, encoded, strict=True):
                writer.write(ids)
                broken = broken or (self.tokenizer.reads_utf8 and not _is_utf8(piece.content))
                if piece.ends_document:
                    writer.write(separator)
                    writer.end_document()
                    num_not_utf8 += broken
                    broken = False
            report.add(sum(len(piece.content) for piece in batch))
        return num_not_utf8


class _Reporter:
    """Sums the finished bytes over all splits for the caller's progress callback."""

    def __init__(self, total_bytes: int, progress: Progress | None) -> None:
        self._total_bytes = total_bytes
        self._progress = progress
        self._done_bytes = 0

    def add(self, size_bytes: int) -> None:
        self._done_bytes += size_bytes
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)


@dataclass(frozen=True)
class _Piece:
    content: bytes
    ends_document: bool


def _pieces(parts: list[DocumentPart]) -> Iterator[_Piece]:
    for part in parts:
        content = read_document(part.document)[part.start : part.end]
        start = 0
        while len(content) - start > PIECE_BYTES:
            cut = line_end_before(content, start, start + PIECE_BYTES)
            yield _Piece(content[start:cut], ends_document=False)
            start = cut
        yield _Piece(content[start:], ends_document=True)


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size_bytes = 0
    for piece in pieces:
        batch.append(piece)
        size_bytes += len(piece.content)
        if size_bytes >= BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _publish_first(temporary: Path, folder: Path) -> bool:
    """Publish and return True, or return False if another process has. Replaces an empty folder."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    try:
        publish(temporary, folder)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY) and (folder / INDEX_NAME).is_file():
            return False
        raise
    return True


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary folders for ``folder`` whose writers were killed long ago."""
    for temporary in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        try:
            newest = max(path.stat().st_mtime for path in (temporary, *temporary.iterdir()))
        except FileNotFoundError:
            continue  # its writer has just removed or published it
        if time.time() - newest > ABANDONED_AFTER_S:
            shutil.rmtree(temporary, ignore_errors=True)
