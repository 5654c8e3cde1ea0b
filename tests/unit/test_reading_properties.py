"""Whatever the text, the separator and the borders of units: every document is read once, and whole."""

from __future__ import annotations

import codecs
import gzip
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from kempnerforge.data.reading import json_lines, pieces, plain_text, table_files, units
from kempnerforge.data.reading.documents import read_pieces, read_records
from kempnerforge.data.reading.files import Compression, Format, TextFile
from kempnerforge.data.reading.items import Piece, Record, Unreadable
from kempnerforge.data.reading.locations import Location
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.reading.pieces import cut_document, first_invalid_byte
from kempnerforge.data.reading.units import units_of

SIZES = st.integers(1, 40)
TEXTS = st.text(st.sampled_from("ab \n\r-ß漢😀"), max_size=80)
SEPARATORS = st.sampled_from(["\n\n", "-", "--", "\n-\n", "ab", "aba", "ß", "😀a😀", "\n\n\n"])


@contextmanager
def sizes(*, unit: int = 1 << 20, block: int = 1 << 20, piece: int = 1 << 20) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "UNIT_BYTES", unit)
        for module in (plain_text, json_lines):
            patch.setattr(module, "BLOCK_BYTES", block)
        for module in (plain_text, pieces):
            patch.setattr(module, "PIECE_BYTES", piece)
        yield


@contextmanager
def written(
    content: bytes, kind: Format = "text", compression: Compression | None = None
) -> Iterator[TextFile]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        yield TextFile(file.name, kind, compression, len(content), mtime_ns=0)


def read_units(file: TextFile, options: ReadOptions) -> list[list[Piece | Unreadable]]:
    parts = units_of(file, options)
    assert [part.number for part in parts] == list(range(len(parts)))
    assert sum(part.size_bytes for part in parts) == file.size_bytes
    assert all(part.size_bytes >= 0 for part in parts)
    read = [list(read_pieces(part, options)) for part in parts]
    for items in read:
        assert not items or isinstance(items[-1], Unreadable) or items[-1].ends_document
    return read


def line_of(item: Unreadable) -> int:
    return int(str(item.location).rpartition(":")[2])


def joined(read: list[list[Piece | Unreadable]]) -> list[bytes]:
    documents: list[bytes] = []
    parts: list[bytes] = []
    for item in (item for items in read for item in items):
        if isinstance(item, Unreadable):
            parts.clear()
            continue
        item.content.decode()
        parts.append(item.content)
        if item.ends_document:
            documents.append(b"".join(parts))
            parts.clear()
    return documents


def split(text: bytes, separator: bytes, piece: int) -> list[bytes]:
    """The documents of ``text`` by definition: what no occurrence of the separator covers."""
    starts = [n for n in range(len(text)) if text.startswith(separator, n)]
    documents: list[bytes] = []
    begin = end = 0
    for start in starts:
        if start >= end:  # it does not overlap the one before
            documents.append(text[begin:start])
        begin = end = start + len(separator)
    documents.append(text[begin:])
    return [
        document for document in documents if document and (len(document) > piece or not document.isspace())
    ]


@given(TEXTS, SEPARATORS, SIZES, SIZES, st.integers(8, 40))
@example("a\n\n\nb", "\n\n", 2, 1, 8)
def test_separated_text_documents_of_units_are_those_of_file(
    text: str, separator: str, unit: int, block: int, piece: int
) -> None:
    options = ReadOptions(document_separator=separator)
    content = text.encode()
    with sizes(unit=unit, block=block, piece=piece), written(content) as file:
        read = read_units(file, options)
    assert joined(read) == split(content, separator.encode(), piece)
    assert all(len(item.content) <= piece for items in read for item in items if isinstance(item, Piece))


@given(TEXTS, SEPARATORS, SIZES, st.integers(8, 40))
def test_separated_text_encodings_have_same_documents(
    text: str, separator: str, block: int, piece: int
) -> None:
    options = ReadOptions(document_separator=separator)
    expected = split(text.encode(), separator.encode(), piece)
    with sizes(block=block, piece=piece):
        variants: list[tuple[bytes, Compression | None]] = [
            (codecs.BOM_UTF8 + text.encode(), None),
            (codecs.BOM_UTF16_BE + text.encode("utf-16-be"), None),
            (gzip.compress(text.encode()), "gzip"),
        ]
        for content, compression in variants:
            with written(content, compression=compression) as file:
                assert joined(read_units(file, options)) == expected


@given(TEXTS, SIZES, st.integers(8, 40))
def test_text_pieces_do_not_depend_on_reads(text: str, block: int, piece: int) -> None:
    content = text.encode()
    with sizes(block=block, piece=piece), written(content) as file:
        (items,) = read_units(file, ReadOptions())
        assert items == list(cut_document(content))
    assert joined([items]) == ([content] if content else [])


@given(TEXTS, st.binary(min_size=1, max_size=2), SEPARATORS, SIZES)
def test_separated_text_damage_leaves_out_its_document(
    text: str, damage: bytes, separator: str, unit: int
) -> None:
    content = text.encode() + b"\xff" + damage + text.encode()
    assume(not content.startswith(b"\xff\xfe"))  # the mark of UTF-16
    options = ReadOptions(document_separator=separator, skip_unreadable=True)
    documents = split(content, separator.encode(), 1 << 20)
    bad = [document for document in documents if first_invalid_byte(document) is not None]
    with sizes(unit=unit), written(content) as file:
        read = read_units(file, options)
        faults = [item for items in read for item in items if isinstance(item, Unreadable)]
        first = content.index(b"\xff")
        assert line_of(faults[0]) == content.count(b"\n", 0, first) + 1
    assert joined(read) == [document for document in documents if document not in bad]
    assert len(faults) == len(bad)
    assert faults[0].reason == f"byte {first} (0xff) is not UTF-8"


LINES = st.lists(
    st.one_of(
        TEXTS.map(lambda text: json.dumps({"text": text})),
        TEXTS.map(lambda text: json.dumps({"text": text}, ensure_ascii=False)),
        st.sampled_from(["", "  ", "{", "[]", '{"a": 1}', '{"text": 1}', r'{"text": "\udc00"}']),
    ),
    max_size=12,
)


@settings(max_examples=40)
@given(LINES, st.booleans(), st.sampled_from([b"\n", b"\r\n"]), SIZES, SIZES, st.sampled_from([0, 1 << 20]))
def test_json_lines_of_units_are_those_of_file(
    lines: list[str], is_ended: bool, line_end: bytes, unit: int, block: int, long_bytes: int
) -> None:
    content = line_end.join(line.encode() for line in lines) + (line_end if is_ended else b"")
    documents: list[bytes] = []
    faults: list[int] = []
    for number, line in enumerate(lines, 1):
        try:
            documents.append(json.loads(line)["text"].encode())
        except (ValueError, KeyError, TypeError, AttributeError):
            faults += [number] if line.strip() else []
    with (
        pytest.MonkeyPatch.context() as patch,
        sizes(unit=unit, block=block),
        written(content, "jsonl") as file,
    ):
        patch.setattr(json_lines, "LONG_LINE_BYTES", long_bytes)
        read = read_units(file, ReadOptions(skip_unreadable=True))
        assert joined(read) == [document for document in documents if document]
        assert [line_of(i) for items in read for i in items if isinstance(i, Unreadable)] == faults


def parsed_both_ways(line: bytes, field: str) -> list[bytes | str]:
    outcomes: list[bytes | str] = []
    for parse in (json_lines._text_of, json_lines._text_of_long):
        try:
            outcomes.append(parse(bytearray(line), field))
        except json_lines._UnreadableLineError as error:
            outcomes.append(str(error).partition(" at character ")[0])
    return outcomes


@settings(max_examples=40)
@given(st.text(max_size=30), st.text(max_size=10), st.booleans())
@example("ü😀" * 1500, "text", True)
@example('\\u00e9"\\\n\x00\x7f\x80é\ue000\U0010ffff', "a\u0100\\", True)
def test_long_json_line_is_parsed_as_short_one(text: str, field: str, is_ascii: bool) -> None:
    line = json.dumps({"a": [text], field: text, "n": 1.5}, ensure_ascii=is_ascii).encode()
    assert parsed_both_ways(line, field) == [text.encode()] * 2


@pytest.mark.parametrize(
    "text",
    [
        r"\uZZZZ",
        r"\u12",
        r"\ud83d\uZZZZ",
        r"\ud83d\u0041",
        r"\ud83d",
        r"\udc00x",
        r"\x",
        r"\\u00fc",
        r"\ud83d\\ude00",
    ],
)
def test_long_json_line_odd_escapes_as_in_short_one(text: str) -> None:
    short, long = parsed_both_ways(b'{"text": "' + text.encode() + b'"}', "text")
    assert short == long


@settings(max_examples=20)
@given(
    st.lists(st.one_of(st.none(), TEXTS), max_size=20),
    st.integers(1, 7),
    st.integers(1, 200),
    st.integers(1, 99),
)
def test_tables_of_units_are_those_of_file(
    texts: list[str | None], part_rows: int, unit: int, batch_bytes: int
) -> None:
    content = pa.table({"text": pa.array(texts, pa.string()), "id": range(len(texts))})
    documents = [text.encode() for text in texts if text]
    nulls = [number for number, text in enumerate(texts, 1) if text is None]
    options = ReadOptions(skip_unreadable=True)
    for kind in ("parquet", "stream", "file", "dictionary"):
        sink = pa.BufferOutputStream()
        if kind == "parquet":
            pq.write_table(content, sink, row_group_size=part_rows)
        else:
            new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
            encoded = content.set_column(0, "text", content["text"].dictionary_encode())
            written_table = encoded if kind == "dictionary" else content
            with new(sink, written_table.schema) as writer:
                writer.write_table(written_table, max_chunksize=part_rows)
        format_ = "parquet" if kind == "parquet" else "arrow"
        with (
            pytest.MonkeyPatch.context() as patch,
            sizes(unit=unit),
            written(sink.getvalue().to_pybytes(), format_) as file,
        ):
            patch.setattr(table_files, "BATCH_BYTES", batch_bytes)
            read = read_units(file, options)
            assert joined(read) == documents
            assert [line_of(i) for items in read for i in items if isinstance(i, Unreadable)] == nulls
            records = [item for part in units_of(file, options) for item in read_records(part, options)]
            assert records == [
                Record({"text": text, "id": n}, Location(file.path, n + 1)) for n, text in enumerate(texts)
            ]
