"""Encode the records of JSON Lines and tables for fine-tuning. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from kempnerforge.config.data import DataConfig
from kempnerforge.data.conversation import Chat, PromptCompletion, RecordFormat
from kempnerforge.data.encoding import (
    ITEM_BYTES,
    Batch,
    Encoded,
    Encoder,
    Notice,
    TextEncoder,
    grouped,
    tokenizer_files,
)
from kempnerforge.data.reading.documents import read_records
from kempnerforge.data.reading.items import Record, Unreadable
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.reading.units import Unit
from kempnerforge.data.record_fields import RecordError
from kempnerforge.data.tokenizer import Tokenizer
from kempnerforge.errors import DataError

BATCH_BYTES = 256 << 10
"""Bytes of records that are encoded at a time. They take several times their size as values."""


def make_encoder(data: DataConfig, tokenizer: Tokenizer, options: ReadOptions) -> Encoder:
    """Return the encoder of ``data.format``.

    Raises :class:`DataError` if the format needs a chat template and there is no usable one.
    """
    if data.format == "text":
        return TextEncoder(tokenizer, options)
    return RecordEncoder(tokenizer, options, make_format(data, tokenizer))


def make_format(data: DataConfig, tokenizer: Tokenizer) -> RecordFormat:
    """Return the format of records. Raises :class:`DataError` as ``make_encoder`` does."""
    if data.format == "chat":
        return Chat(tokenizer, messages_field=data.messages_field, chat_template=data.chat_template)
    fields = {"prompt_field": data.prompt_field, "completion_field": data.completion_field}
    return PromptCompletion(tokenizer, **fields)


@dataclass(frozen=True)
class RecordEncoder:
    """Records in a format for fine-tuning: a document each, of which some tokens count."""

    tokenizer: Tokenizer
    options: ReadOptions
    records: RecordFormat
    may_cut = False
    has_counted = True

    @property
    def format(self) -> str:
        """As data.format."""
        return self.records.name

    @property
    def notes(self) -> tuple[str, ...]:
        """How answers are found."""
        return self.records.notes

    def files(self) -> dict[str, bytes]:
        """Return the files of the tokenizer, with the chat template that was used."""
        return {**tokenizer_files(self.tokenizer), **self.records.files()}

    def key(self) -> dict[str, Any]:
        """Return the digest of the format, and how files are read."""
        return {"format": self.records.digest, "options": asdict(self.options)}

    def read(self, unit: Unit) -> Iterator[Batch]:
        """Yield the records of ``unit``."""
        sized = (
            (item, ITEM_BYTES + (item.size_bytes if isinstance(item, Record) else 0))
            for item in read_records(unit, self.options)
        )
        for items in grouped(sized, BATCH_BYTES):
            yield Batch(unit.file.path, items)

    def encode(self, batch: Batch) -> Iterator[Encoded | Unreadable | Notice]:
        """Yield the records of ``batch`` in order.

        Raises :class:`DataError`, with file and line, for a record that the tokenizer cannot encode, and
        unless ``options.skip_unreadable`` for one that is not of the format.
        """
        seen: set[str] = set()
        for record in batch.items:
            if isinstance(record, Unreadable):
                yield record
            elif isinstance(record, Record):
                try:
                    encoded = self.records.encode(record.value)
                except RecordError as error:
                    yield self._unreadable(record, error)
                    continue
                except DataError as error:  # of the tokenizer, not of the record
                    raise DataError(f"{record.location}: {error}") from error
                what = self.records.special_text
                for token in encoded.special:
                    if token not in seen:
                        seen.add(token)
                        text = f"has the text {token}, and there may be more; {what}"
                        yield Notice(token, record.location, text)
                yield Encoded(encoded.ids, encoded.content, ends_document=True, counted=encoded.counted)

    def _unreadable(self, record: Record, error: RecordError) -> Unreadable:
        if not self.options.skip_unreadable:
            raise DataError(
                f"{record.location}: {error}. To leave such records out: data.skip_unreadable = true "
                "(--skip-unreadable)"
            ) from error
        return Unreadable(record.location, str(error))
