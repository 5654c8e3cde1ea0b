"""Encode the records of JSON Lines and tables for fine-tuning. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from kempnerforge.data.chat_template import RecordError
from kempnerforge.data.conversation import RecordFormat
from kempnerforge.data.encoding import Encoded, SeparatorSeen, SpecialTokenSeen
from kempnerforge.data.reading.documents import read_records
from kempnerforge.data.reading.items import Record, Unreadable
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.reading.units import Unit
from kempnerforge.data.tokenizer import Tokenizer
from kempnerforge.errors import DataError


@dataclass(frozen=True)
class RecordEncoder:
    """Records in a format for fine-tuning: a document each, of which some tokens count."""

    tokenizer: Tokenizer
    options: ReadOptions
    format: RecordFormat
    may_cut = False
    has_counted = True

    def key(self) -> dict[str, Any]:
        """Return the digest of the format, and how files are read."""
        return {"format": self.format.digest, "options": asdict(self.options)}

    def encode(self, unit: Unit, *, threads: int = 1) -> Iterator[Encoded | Unreadable | SeparatorSeen]:
        """Yield the records of ``unit`` in order.

        Raises :class:`DataError` for a record that is not of the format, with its file and line, unless
        ``options.skip_unreadable``.
        """
        seen: set[str] = set()
        for record in read_records(unit, self.options):
            if isinstance(record, Unreadable):
                yield record
                continue
            try:
                encoded = self.format.encode(record.value)
            except RecordError as error:
                yield self._unreadable(unit, record, error)
                continue
            if encoded.special is not None and encoded.special not in seen:
                seen.add(encoded.special)
                yield SpecialTokenSeen(record.where, encoded.special)
            yield Encoded(encoded.ids, encoded.content, ends_document=True, counted=encoded.counted)

    def _unreadable(self, unit: Unit, record: Record, error: RecordError) -> Unreadable:
        if not self.options.skip_unreadable:
            raise DataError(
                f"{record.where}: {error}. To leave such records out: data.skip_unreadable = true "
                "(--skip-unreadable)"
            )
        return Unreadable(unit.file.path, int(record.where.rpartition(":")[2]), error.reason)
