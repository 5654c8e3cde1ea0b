"""Choose what is held out of the documents of all parts, and write the shards of both splits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kempnerforge.data.encoding import Encoder
from kempnerforge.data.index import SplitEntry
from kempnerforge.data.prepare_progress import Meter, OnProgress
from kempnerforge.data.shard_writer import ShardWriter
from kempnerforge.data.token_parts import PartReader, Task
from kempnerforge.data.tokenizer import token_dtype
from kempnerforge.data.train_val_split import (
    CUT,
    CUT_SLACK,
    MAX_CUT_SLACK_BYTES,
    POOL,
    TOLERANCE,
    WHOLE,
    DigestChoice,
    EvenChoice,
    cut_position,
    max_lead_bytes,
    rules_for,
)
from kempnerforge.errors import DataError

TRAIN, VAL, IN_BOTH, IN_BOTH_TOGETHER = 0, 1, 2, 3
"""Where a document is: in one split, or cut. Documents that are cut together give the share together,
because the share of each may be less than a token."""

CUT_BLOCK_TOKENS = 1 << 18
"""A long end of a document is looked at in blocks."""


class Assembly:
    """The parts of all tasks, and which of their documents are held out."""

    def __init__(self, tasks: Sequence[Task], parts: Path, encoder: Encoder, val_fraction: float) -> None:
        self._tasks = tasks
        self._parts = parts
        self._encoder = encoder
        self._fraction = val_fraction
        self._dtype = token_dtype(encoder.tokenizer.vocab_size)
        self._count_files()

    @property
    def text_bytes(self) -> int:
        """Bytes of text of all documents."""
        return int(self._file_bytes.sum())

    @property
    def num_documents(self) -> int:
        """Number of all documents."""
        return int(self._file_documents.sum())

    def readers(self) -> Iterator[tuple[PartReader, np.ndarray]]:
        """Yield each part with the number of the file of each of its units."""
        file, path = -1, None
        for task in self._tasks:
            numbers = []
            for unit in task.units:
                file += unit.file.path != path
                path = unit.file.path
                numbers.append(file)
            folder = self._parts / task.name
            yield (
                PartReader(folder, self._dtype, has_counted=self._encoder.has_counted),
                np.array(numbers),
            )

    def _count_files(self) -> None:
        size = 1 + sum(len(task.units) for task in self._tasks)
        self._file_bytes = np.zeros(size, dtype=np.int64)
        self._file_documents = np.zeros(size, dtype=np.int64)
        self._first_digests = np.zeros(size, dtype=np.uint64)
        self._tokens = 0
        for reader, files in self.readers():
            for file, unit in zip(files, reader.part.units, strict=True):
                if unit.documents and not self._file_documents[file]:
                    self._first_digests[file] = unit.first_digest
                self._file_bytes[file] += unit.text_bytes
                self._file_documents[file] += unit.documents
                self._tokens += unit.tokens

    def write(
        self, folder: Path, shard_tokens: int, progress: OnProgress | None = None
    ) -> dict[str, SplitEntry]:
        """Write the shards of the splits into ``folder`` and return their entries. Empty splits are omitted.

        Raises :class:`DataError` if the held-out share cannot be within a tenth of the fraction.
        """
        limit = self._digest_limit() if self._fraction else 0
        writers = [ShardWriter(folder, name, self._dtype, shard_tokens) for name in ("train", "val")]
        meter = Meter("wrote", self._tokens * self._dtype.itemsize, progress)
        output = _Output(writers, self._encoder, self._fraction, meter.add)
        try:
            for reader, files in self.readers():
                offset = 0
                for documents, places in self._placed(reader, files, limit):
                    output.write(reader, documents, places, offset)
                    offset += int(documents["tokens"].sum())
            self._check_share(output.text_bytes[VAL])
            entries = [
                writer.close(text_bytes=size) for writer, size in zip(writers, output.text_bytes, strict=True)
            ]
        finally:
            for writer in writers:
                writer.abandon()
        return {name: entry for name, entry in zip(("train", "val"), entries, strict=True) if entry.tokens}

    def _placed(
        self, reader: PartReader, files: np.ndarray, limit: int | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield documents and where each is: TRAIN, VAL or IN_BOTH."""
        for documents, rules, held_out in self._ruled(reader, files):
            places = np.where(held_out, VAL, TRAIN)
            places[rules == CUT] = IN_BOTH
            if limit is None:
                places[rules == POOL] = IN_BOTH_TOGETHER
            else:
                places[(rules == POOL) & (documents["digest"] < np.uint64(limit))] = VAL
            yield documents, places

    def _ruled(
        self, reader: PartReader, files: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield documents, the rule of each, and which of those with the rule WHOLE are held out."""
        for documents, units in reader.documents():
            held_out = np.zeros(documents.size, dtype=bool)
            if not self._fraction:
                yield documents, np.full(documents.size, WHOLE), held_out
                continue
            of_file = files[units]
            sizes = documents["bytes"].astype(np.int64)
            may_cut = self._encoder.may_cut
            rules = rules_for(sizes, self._file_bytes[of_file], self._fraction, may_cut=may_cut)
            for file in np.unique(of_file[rules == WHOLE]):
                chosen = np.flatnonzero((of_file == file) & (rules == WHOLE))
                held_out[chosen] = self._even_choice(int(file)).choose(sizes[chosen])
            yield documents, rules, held_out

    def _even_choice(self, file: int) -> EvenChoice:
        """Return the choice of ``file``, which continues over the parts of the file."""
        if self._current[0] != file:
            size_bytes, count = int(self._file_bytes[file]), int(self._file_documents[file])
            lead_bytes = max_lead_bytes(size_bytes, count, self._fraction)
            self._current = (file, EvenChoice(self._fraction, int(self._first_digests[file]), lead_bytes))
        return self._current[1]

    _current: tuple[int, Any] = (-1, None)

    def _digest_limit(self) -> int | None:
        """Return the limit for the rule POOL. None: cut these documents."""
        pool = DigestChoice(self._fraction)
        elsewhere = 0.0
        cut_bytes = 0
        for reader, files in self.readers():
            for documents, rules, held_out in self._ruled(reader, files):
                sizes = documents["bytes"].astype(np.int64)
                elsewhere += float(sizes[held_out].sum())
                cut_bytes += int(sizes[rules == CUT].sum())
                of_pool = rules == POOL
                pool.add(documents["digest"][of_pool], sizes[of_pool])
        self._current = (-1, None)
        if not pool.total_bytes:
            return 0
        elsewhere += cut_bytes * self._fraction
        wanted = self.text_bytes * self._fraction
        tolerance = TOLERANCE * wanted - CUT_SLACK * cut_bytes * self._fraction
        limit = pool.limit(wanted - elsewhere, tolerance)
        if limit is None and not self._encoder.may_cut:
            self._refuse("no choice of whole documents")
        return limit

    def _check_share(self, held_out_bytes: float) -> None:
        wanted = self.text_bytes * self._fraction
        if abs(held_out_bytes - wanted) > TOLERANCE * wanted:
            self._refuse(f"held out are {held_out_bytes / max(1, self.text_bytes):.3g} of it, which")

    def _refuse(self, what: str) -> None:
        raise DataError(
            f"too little text to hold out val_fraction = {self._fraction:g} of {self.text_bytes:,} bytes in "
            f"{self.num_documents:,} documents: {what} is within a tenth of it. Add text, or set "
            "data.val_fraction (--val-fraction) to a larger value, or to 0 and eval.interval to 0"
        )


class _Output:
    """Writes documents to the splits in which they are."""

    def __init__(
        self,
        writers: Sequence[ShardWriter],
        encoder: Encoder,
        fraction: float,
        wrote_bytes: Callable[[int], None],
    ) -> None:
        self.text_bytes = [0, 0]
        """Bytes of text in train and val. Those of a cut document by the lengths of its tokens."""
        self._writers = writers
        self._fraction = fraction
        self._wrote_bytes = wrote_bytes
        special = encoder.tokenizer.special
        self._bos = np.array([] if special.bos_id is None else [special.bos_id])
        self._separator = np.array([encoder.tokenizer.separator_id])
        self._tokenizer = encoder.tokenizer
        self._lengths: np.ndarray | None = None
        self._owed_bytes = 0.0
        """What the documents that are cut together have held out too little so far."""

    def write(self, reader: PartReader, documents: np.ndarray, places: np.ndarray, offset: int) -> None:
        """Write ``documents``, whose tokens begin at ``offset`` in the part."""
        ends = offset + np.cumsum(documents["tokens"].astype(np.int64))
        starts = ends - documents["tokens"].astype(np.int64)
        changes = (places[1:] != places[:-1]) | (places[1:] >= IN_BOTH)
        bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), documents.size]
        for first, last in itertools.pairwise(bounds):
            start, stop = int(starts[first]), int(ends[last - 1])
            size_bytes = int(documents["bytes"][first:last].sum())
            if places[first] >= IN_BOTH:
                owed_bytes = self._owed_bytes if places[first] == IN_BOTH_TOGETHER else 0.0
                wanted = min(max(0.0, size_bytes * self._fraction + owed_bytes), size_bytes)
                held_out_bytes = self._write_cut(reader, start, stop, size_bytes, wanted)
                if places[first] == IN_BOTH_TOGETHER:
                    self._owed_bytes += size_bytes * self._fraction - held_out_bytes
            else:
                self._write_range(reader, int(places[first]), start, stop, ends[first:last])
                self.text_bytes[places[first]] += size_bytes

    def _write_range(self, reader: PartReader, split: int, start: int, stop: int, ends: np.ndarray) -> None:
        for ids, counted in reader.tokens(start, stop):
            here = ends[(ends > start) & (ends <= start + ids.size)] - start
            self._writers[split].write(ids, here, counted)
            self._wrote_bytes(ids.nbytes)
            start += ids.size

    def _write_cut(
        self, reader: PartReader, start: int, stop: int, size_bytes: int, wanted_bytes: float
    ) -> int:
        """Hold out the end of a document of ``size_bytes``. Return how many bytes that is."""
        cut, held_out_bytes = self._cut(reader, start + self._bos.size, stop - 1, size_bytes, wanted_bytes)
        if cut == stop - 1:
            self._write_range(reader, TRAIN, start, stop, np.array([stop]))
        elif cut == start + self._bos.size:
            self._write_range(reader, VAL, start, stop, np.array([stop]))
        else:
            self._write_range(reader, TRAIN, start, cut, np.array([], dtype=np.int64))
            self._writers[TRAIN].write(self._separator, np.array([1]))
            self._writers[VAL].write(self._bos)
            self._write_range(reader, VAL, cut, stop, np.array([stop]))
        self.text_bytes[VAL] += held_out_bytes
        self.text_bytes[TRAIN] += size_bytes - held_out_bytes
        return held_out_bytes

    def _cut(
        self, reader: PartReader, start: int, stop: int, size_bytes: int, wanted_bytes: float
    ) -> tuple[int, int]:
        """Return where to cut the ids from ``start`` to ``stop``, and the bytes of text after it."""
        lengths = self._token_table()
        total = sum(int(lengths[ids].sum()) for ids, _ in reader.tokens(start, stop))
        scale = size_bytes / max(1, total)  # not 1 for tokenizers that normalize
        target = wanted_bytes / scale
        slack = min(target * CUT_SLACK, MAX_CUT_SLACK_BYTES)
        after = 0  # bytes after ``stop``, while whole blocks are passed over from the end
        while stop - start > CUT_BLOCK_TOKENS:
            block = self._ids(reader, stop - CUT_BLOCK_TOKENS, stop)
            block_bytes = int(lengths[block].sum())
            if after + block_bytes > target + slack:
                break
            after += block_bytes
            stop -= CUT_BLOCK_TOKENS
        begin = max(start, stop - CUT_BLOCK_TOKENS)
        ids = self._ids(reader, begin, stop)
        cut = cut_position(
            lengths[ids], self._ends_line[ids], self._begins_character[ids], target - after, slack
        )
        return begin + cut, round((after + int(lengths[ids[cut:]].sum())) * scale)

    def _ids(self, reader: PartReader, start: int, stop: int) -> np.ndarray:
        return np.concatenate(
            [ids for ids, _ in reader.tokens(start, stop)] or [np.array([], dtype=np.int64)]
        )

    def _token_table(self) -> np.ndarray:
        """Return the bytes of each id [vocab_size]. Makes the tables at the first use."""
        if self._lengths is None:
            tokens = self._tokenizer.token_bytes()
            self._lengths = np.array([len(token) for token in tokens], dtype=np.int64)
            self._ends_line = np.array([token.endswith(b"\n") for token in tokens])
            self._begins_character = np.array(
                [token[:1] and token[0] & 0xC0 != 0x80 for token in tokens], bool
            )
        return self._lengths
