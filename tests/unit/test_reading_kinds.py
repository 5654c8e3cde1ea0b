"""Kinds of files that people have, and the documents that are read from each."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kempnerforge.data.reading.documents import read_pieces
from kempnerforge.data.reading.files import PassedOver, TextFile, find_files
from kempnerforge.data.reading.items import Unreadable
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.reading.units import units_of
from kempnerforge.errors import DataError

LONG = "".join(f"line {n}\n" for n in range(60_000))
ASTRAL = "\U0001f600"


@dataclass(frozen=True)
class Kind:
    """A file, and what is expected of it."""

    name: str
    content: bytes
    documents: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    """Where and why, after the path: parts of the messages."""
    passed_over: str = ""
    note: str = ""


def lines(*values: Any) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def texts(*documents: str) -> bytes:
    return lines(*({"text": document} for document in documents))


def table(column: Any, name: str = "text") -> pa.Table:
    return pa.table({"id": range(len(column)), name: column})


def parquet(content: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(content, sink, **options)
    return sink.getvalue()


def arrow(content: pa.Table, kind: str = "stream", rows: int = 2, **options: Any) -> bytes:
    sink = io.BytesIO()
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with new(sink, content.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(content, max_chunksize=rows)
    return sink.getvalue()


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


WINDOW_OF_256_MB = b"\x28\xb5\x2f\xfd\x00\x90\x09\x00\x00a"
SKIPPABLE_FRAME = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
ABC = table(pa.array(["a", "b", "c"]))
WORDS = b"".join(b"%d " % (n * 7919 % 100_003) for n in range(50_000))
LONG_RECORD = texts("x" * 70_000)
COMPRESSED_TEXTS = texts(*(f"document {n} {n * 7919 % 100_003}" for n in range(20_000)))

TEXT = [
    Kind("plain.txt", b"one\ntwo\n", ("one\ntwo\n",)),
    Kind("no_final_newline.txt", b"one\ntwo", ("one\ntwo",)),
    Kind("code.py", b"x = 1\n", ("x = 1\n",)),
    Kind("no_suffix", b"text", ("text",)),
    Kind("crlf.txt", b"one\r\ntwo\r\n", ("one\r\ntwo\r\n",)),
    Kind("old_mac.txt", b"one\rtwo\r", ("one\rtwo\r",)),
    Kind("non_ascii.md", "Füße ½ 漢字 😀".encode(), ("Füße ½ 漢字 😀",)),
    Kind("bom.txt", codecs.BOM_UTF8 + b"text", ("text",)),
    Kind("only_bom.txt", codecs.BOM_UTF8),
    Kind(
        "utf16_le.txt",
        codecs.BOM_UTF16_LE + f"naïve {ASTRAL}\r\n".encode("utf-16-le"),
        (f"naïve {ASTRAL}\r\n",),
    ),
    Kind("utf16_be.txt", codecs.BOM_UTF16_BE + "naïve".encode("utf-16-be"), ("naïve",)),
    Kind("white_space.txt", b" \n\n", (" \n\n",)),
    Kind("form_feed.txt", "a\x0cb\u2028".encode(), ("a\x0cb\u2028",)),
    Kind("nul_late.txt", b"a" * 8000 + b"\0b", ("a" * 8000 + "\0b",)),
    Kind("long.txt", LONG.encode(), (LONG,)),
    Kind("long_line.txt", b"x" * 600_000, ("x" * 600_000,)),
    Kind("long_line_no_ascii.txt", ASTRAL.encode() * 100_001, (ASTRAL * 100_001,)),
    Kind("config.json", b'{"a": 1}\n', ('{"a": 1}\n',)),
    Kind("number_list.json", b"[[1, 2]]", ("[[1, 2]]",)),
    Kind("minified.json", LONG_RECORD[:-1], (LONG_RECORD[:-1].decode(),), note="JSON that is read as text"),
    Kind(
        "indented.json",
        json.dumps([LONG], indent=1).encode(),
        (json.dumps([LONG], indent=1),),
        note="JSON that is read as text",
    ),
    Kind("latin1.txt", "ok\nF\xfc\xdfe".encode("latin-1"), (), (":2: byte 4 (0xfc) is not UTF-8",)),
    Kind("latin1_bom.txt", codecs.BOM_UTF8 + b"ab\xff", (), (":1: byte 5 (0xff) is not UTF-8",)),
    Kind("cut_character.txt", "aß".encode()[:-1], (), (":1: byte 1 (0xc3) is not UTF-8",)),
    Kind("late_damage.txt", LONG.encode() + b"\xc0", (), (f":60001: byte {len(LONG)} (0xc0) is not UTF-8",)),
    Kind("surrogate_in_utf8.txt", b"a\xed\xa0\x80", (), (":1: byte 1 (0xed) is not UTF-8",)),
    Kind("utf16_cut.txt", codecs.BOM_UTF16_LE + b"a\0b", (), (":1: byte 4 is not UTF-16",)),
    Kind("utf16_lone.txt", codecs.BOM_UTF16_LE + b"a\0\0\xd8b\0", (), (":1: byte 4 is not UTF-16",)),
]

COMPRESSED = [
    Kind("text.txt.gz", gzip.compress(b"one\n"), ("one\n",)),
    Kind("members.txt.gz", gzip.compress(b"one\n") + gzip.compress(b"two\n"), ("one\ntwo\n",)),
    Kind("zero_padded.txt.gz", gzip.compress(b"one\n") + b"\0" * 512, ("one\n",)),
    Kind("utf16.txt.gz", gzip.compress("naïve".encode("utf-16")), ("naïve",)),
    Kind("records.jsonl.gz", gzip.compress(texts("a", "b")), ("a", "b")),
    Kind("text.txt.zst", zstd(b"one\n"), ("one\n",)),
    Kind("frames.txt.zst", zstd(b"one\n") + SKIPPABLE_FRAME + zstd(b"two\n"), ("one\ntwo\n",)),
    Kind("short_members.txt.gz", b"".join(map(gzip.compress, [b"\xef", b"\xbb", b"\xbfa"])), ("a",)),
    Kind("skippable_first.txt.zst", SKIPPABLE_FRAME + zstd(b"one\n"), ("one\n",)),
    Kind("bom.jsonl.zst", zstd(codecs.BOM_UTF8 + texts("a", "b")), ("a", "b")),
    Kind("long.txt.zst", zstd(LONG.encode()), (LONG,)),
    Kind("gzip_inside.txt", gzip.compress(b"one"), ("one",), note="it is gzip data, although"),
    Kind("zstd_inside.jsonl", zstd(texts("a")), ("a",), note="it is zstd data, although"),
    Kind("text_inside.txt.gz", b"one", ("one",), note="it is not compressed, although"),
    Kind("cut.txt.gz", gzip.compress(WORDS)[:-2000], (), (": the gzip data are cut off",)),
    Kind("cut.txt.zst", zstd(WORDS)[:-2000], (), (": the zstd data are cut off",)),
    Kind("cut_at_once.txt.gz", gzip.compress(b"one")[:12], (), (":1: the gzip data are cut off",)),
    Kind(
        "trailing.txt.gz",
        gzip.compress(b"one") + b"garbage",
        (),
        (":1: the gzip data cannot be decompressed",),
    ),
    Kind("window.txt.zst", WINDOW_OF_256_MB, (), (":1: the zstd data cannot be decompressed",)),
    Kind("checksum.txt.zst", zstd(b"one")[:-1] + b"!", (), (":1: the zstd data cannot be decompressed",)),
]

RECORDS = [
    Kind("records.jsonl", texts("a", "b\nc"), ("a", "b\nc")),
    Kind("records.ndjson", texts("a"), ("a",)),
    Kind("UPPER.JSONL", texts("a"), ("a",)),
    Kind("no_newline.jsonl", texts("a", "b")[:-1], ("a", "b")),
    Kind("blank_lines.jsonl", b"\n" + texts("a") + b"  \r\n\n" + texts("b"), ("a", "b")),
    Kind("crlf.jsonl", texts("a", "b").replace(b"\n", b"\r\n"), ("a", "b")),
    Kind("bom.jsonl", codecs.BOM_UTF8 + texts("a"), ("a",)),
    Kind("utf16.jsonl", '{"text": "ü"}\n{"text": "b"}'.encode("utf-16"), ("ü", "b")),
    Kind("escapes.jsonl", rb'{"text": "\u00fc\ud83d\ude00\n\"\\u0041"}', (f'ü{ASTRAL}\n"\\u0041',)),
    Kind("not_ascii.jsonl", '{"text": "ü漢😀\u2028x"}'.encode(), ("ü漢😀\u2028x",)),
    Kind("other_fields.jsonl", lines({"id": 1, "meta": {"text": "no"}, "text": "a"}), ("a",)),
    Kind("empty_documents.jsonl", texts("", "a", ""), ("a",)),
    Kind("nul.jsonl", rb'{"text": "a\u0000b"}', ("a\0b",)),
    Kind("twice.jsonl", b'{"text": "a", "text": "b"}', ("b",)),
    Kind("long.jsonl", texts(LONG, "b"), (LONG, "b")),
    Kind("lines.json", texts("a", "b"), ("a", "b"), note="it is JSON Lines, although"),
    Kind("blank_lines.json", texts("a") + b"\n" + texts("b"), ("a", "b"), note="it is JSON Lines, although"),
    Kind("long_line.json", LONG_RECORD + texts("b"), ("x" * 70_000, "b"), note="it is JSON Lines, although"),
    Kind(
        "long_line.json.zst",
        zstd(LONG_RECORD + texts("b")),
        ("x" * 70_000, "b"),
        note="it is JSON Lines, although",
    ),
    Kind("lines.json.gz", gzip.compress(texts("a", "b")), ("a", "b"), note="it is JSON Lines, although"),
    Kind("damaged.jsonl", texts("a") + b'{"text": "b\n' + texts("c"), ("a", "c"), (":2: not JSON: ",)),
    Kind("cut.jsonl", texts("a", "b")[:-4], ("a",), (":2: not JSON: ",)),
    Kind(
        "latin1.jsonl", texts("a") + b'{"text": "\xfc"}', ("a",), (":2: byte 10 of the line (0xfc) is not",)
    ),
    Kind("list.jsonl", b'["text"]\n' + texts("a"), ("a",), (":1: it is a list, not an object",)),
    Kind("string.jsonl", b'"text"\n' + texts("a"), ("a",), (":1: it is text, not an object",)),
    Kind(
        "no_field.jsonl",
        texts("a") + lines({"body": "b", "id": 1}),
        ("a",),
        (':2: it has no field "text" (there are: "body", "id")',),
    ),
    Kind(
        "number.jsonl",
        lines({"text": 1}, {"text": True}),
        (),
        (':1: "text" is a number', ':2: "text" is true or false'),
    ),
    Kind("null.jsonl", b'\n\n{"text": null}', (), (':3: "text" is null, not text',)),
    Kind(
        "nan.jsonl",
        b'{"text": "a", "x": NaN}\n{"text": "b", "x": -Infinity}',
        (),
        (":1: NaN is", ":2: -Infinity is"),
    ),
    Kind(
        "surrogate.jsonl",
        rb'{"text": "\ud800"}' + b"\n" + texts("a"),
        ("a",),
        (r":1: an escape such as \ud800",),
    ),
    Kind("deep.jsonl", b'{"text": ' + b"[" * 100_000, (), (":1: it is nested too deeply",)),
    Kind(
        "digits.jsonl", b'{"text": "a", "x": ' + b"1" * 5000 + b"}", (), (":1: not JSON: Exceeds the limit",)
    ),
    Kind("cut.jsonl.gz", gzip.compress(COMPRESSED_TEXTS)[:-5], (), (": the gzip data are cut off",)),
]

TABLES = [
    Kind("rows.parquet", parquet(ABC), ("a", "b", "c")),
    Kind("row_groups.parquet", parquet(ABC, row_group_size=1), ("a", "b", "c")),
    Kind("no_rows.parquet", parquet(ABC.slice(0, 0))),
    Kind("zstd.parquet", parquet(ABC, compression="zstd"), ("a", "b", "c")),
    Kind("large_string.parquet", parquet(table(pa.array(["a"], pa.large_string()))), ("a",)),
    Kind(
        "dictionary.parquet", parquet(table(pa.array(["a", "b", "a"]).dictionary_encode())), ("a", "b", "a")
    ),
    Kind(
        "binary.parquet",
        parquet(table(pa.array([b"a", b"\xff"]))),
        ("a",),
        (":2: byte 0 of the text (0xff)",),
    ),
    Kind(
        "nulls.parquet",
        parquet(table(["a", None, "", "b"]), row_group_size=2),
        ("a", "b"),
        (':2: "text" is null',),
    ),
    Kind(
        "no_column.parquet",
        parquet(table(["a"], "body")),
        (),
        (': it has no column "text" (there are: "id", "body")',),
    ),
    Kind("numbers.parquet", parquet(table([1])), (), (': its column "text" has type int64, not text',)),
    Kind("cut.parquet", parquet(ABC)[:-1], (), (": it is damaged or cut off",)),
    Kind("text.parquet", b"not a table", (), (": it is damaged or cut off",)),
    Kind("rows", parquet(ABC), ("a", "b", "c"), note="it is a Parquet file, although"),
    Kind("stream.arrow", arrow(ABC), ("a", "b", "c")),
    Kind("file.arrow", arrow(ABC, "file"), ("a", "b", "c")),
    Kind("file.feather", arrow(ABC, "file", compression="zstd"), ("a", "b", "c"), note="it is an Arrow file"),
    Kind("no_rows.arrow", arrow(ABC.slice(0, 0))),
    Kind(
        "large.arrow", arrow(table(pa.array(["a", None], pa.large_string()))), ("a",), (':2: "text" is null',)
    ),
    Kind("view.arrow", arrow(table(pa.array(["a", "b" * 40], pa.string_view()))), ("a", "b" * 40)),
    Kind("dictionary.arrow", arrow(table(pa.array(["a", "b", "a"]).dictionary_encode())), ("a", "b", "a")),
    Kind("cut.arrow", arrow(ABC)[:-40], ("a", "b"), (":3: it is damaged or cut off",)),
    Kind("cut_file.arrow", arrow(ABC, "file")[:-10], (), (": it is damaged or cut off",)),
    Kind("text.arrow", b"not a table", (), (": it is damaged or cut off",)),
]

JSON_ARRAY = "JSON array of objects; convert it: jq -c '.[]' FILE.json > FILE.jsonl"

PASSED_OVER = [
    Kind("list.json", b'[{"text": "a"}]', passed_over=JSON_ARRAY),
    Kind("indented_list.JSON", codecs.BOM_UTF8 + b'\n[\n  {"text": "a"}\n]', passed_over=JSON_ARRAY),
    Kind("list.json.gz", gzip.compress(b'[{"text": "a"}]'), passed_over=f"gzip data: {JSON_ARRAY}"),
    Kind("rows.csv", b"text,n\na,1\n", passed_over="CSV table; convert it to JSON Lines or Parquet"),
    Kind("utf16.tsv", "a\tb".encode("utf-16"), passed_over="TSV table; convert it to JSON Lines or Parquet"),
    Kind("empty.txt", b"", passed_over="empty"),
    Kind("empty.txt.gz", gzip.compress(b""), passed_over="empty"),
    Kind("data.bin", b"abc\0def", passed_over="binary"),
    Kind("named.jsonl", b"\0\1\2", passed_over="binary"),
    Kind("utf16_unmarked.txt", "text".encode("utf-16-le"), passed_over="binary"),
    Kind("utf32.txt", "text".encode("utf-32"), passed_over="UTF-32 text; convert it to UTF-8"),
    Kind(
        "pointer.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        passed_over="git-lfs pointer, not the file itself; run git lfs pull",
    ),
    Kind("paper.pdf", b"%PDF-1.7\n", passed_over="PDF document"),
    Kind("letter.docx", b"PK\x03\x04....", passed_over="Office document"),
    Kind("files.zip", b"PK\x03\x04....", passed_over="zip archive; unpack it first"),
    Kind("files.tar", b"name".ljust(257, b"\0") + b"ustar\0", passed_over="tar archive; unpack it first"),
    Kind(
        "files.tar.gz",
        gzip.compress(b"name".ljust(257, b"\0") + b"ustar\0"),
        passed_over="gzip data: tar archive; unpack it first",
    ),
    Kind(
        "rows.parquet.gz",
        gzip.compress(parquet(ABC)),
        passed_over="gzip data: a Parquet file; decompress it first",
    ),
    Kind("text.txt.xz", b"\xfd7zXZ\x00\x00", passed_over="xz data; decompress it first"),
    Kind("text.txt.bz2", b"BZh91AY", passed_over="bzip2 data; decompress it first"),
    Kind("picture.png", b"\x89PNG\r\n\x1a\n", passed_over="PNG image"),
]

KINDS = [*TEXT, *COMPRESSED, *RECORDS, *TABLES, *PASSED_OVER]


def read(file: TextFile, options: ReadOptions) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The documents of a file, and the messages about what cannot be read."""
    documents: list[str] = []
    messages: list[str] = []
    parts: list[str] = []
    for unit in units_of(file, options):
        for item in read_pieces(unit, options):
            if isinstance(item, Unreadable):
                messages.append(str(item).removeprefix(str(file.path)))
                parts.clear()
                continue
            assert item.content
            parts.append(item.content.decode())
            if item.ends_document:
                documents.append("".join(parts))
                parts.clear()
    assert not parts
    return tuple(documents), tuple(messages)


def found(kind: Kind, folder: Path) -> TextFile | PassedOver:
    (folder / kind.name).write_bytes(kind.content)
    files = find_files(str(folder / kind.name))
    (item,) = [*files.files, *files.passed_over]
    return item


def test_reading_kinds_are_many_and_differ() -> None:
    names = [kind.name for kind in KINDS]
    assert len(names) >= 40
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_reading_kind_has_expected_documents(kind: Kind, tmp_path: Path) -> None:
    file = found(kind, tmp_path)
    if kind.passed_over:
        assert file == PassedOver(str(tmp_path / kind.name), kind.passed_over, len(kind.content))
        return
    assert isinstance(file, TextFile)
    assert bool(kind.note) == bool(file.note)
    assert kind.note in file.note
    documents, messages = read(file, ReadOptions(skip_unreadable=True))
    assert len(messages) == len(kind.unreadable)
    for message, expected in zip(messages, kind.unreadable, strict=True):
        assert expected in message
    if kind.name == "cut.jsonl.gz":
        assert len(documents) > 19_000
        assert all(text.startswith(f"document {n} ") for n, text in enumerate(documents))
    else:
        assert documents == kind.documents
    if kind.unreadable:
        with pytest.raises(DataError) as caught:
            read(file, ReadOptions())
        assert kind.unreadable[0] in str(caught.value)
        assert str(caught.value).startswith(str(file.path))
        assert "data.skip_unreadable = true (--skip-unreadable)" in str(caught.value)
    else:
        assert read(file, ReadOptions()) == (documents, ())


def damaged(content: bytes, choose: random.Random) -> bytes:
    result = bytearray(content)
    for _ in range(choose.randint(1, 3)):
        place = choose.randrange(len(result))
        if choose.random() < 0.7:
            result[place] = choose.randrange(256)
        else:
            result[place:] = choose.randbytes(choose.randrange(4)) + result[place + choose.randrange(9) :]
        if not result:
            return b"x"
    return bytes(result)


@settings(max_examples=100)
@given(st.sampled_from([kind for kind in KINDS if 0 < len(kind.content) < 20_000]), st.randoms())
def test_reading_any_damage_is_reported(kind: Kind, choose: random.Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        item = found(replace(kind, content=damaged(kind.content, choose)), Path(folder))
        if isinstance(item, TextFile):
            read(item, ReadOptions(skip_unreadable=True))
