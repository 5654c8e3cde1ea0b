"""What a file contains, by its first bytes and its name."""

from __future__ import annotations

import codecs
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kempnerforge.data.reading.items import MAX_DOCUMENT_BYTES
from kempnerforge.data.reading.streams import (
    BLOCK_BYTES,
    UTF16_MARKS,
    UTF32_MARKS,
    Compression,
    DamagedStreamError,
    decompressed,
    open_file,
    open_stream,
    storage_errors,
)

Format = Literal["text", "jsonl", "parquet", "arrow"]

HEAD_BYTES = 64 << 10
"""Bytes at the beginning of a file that are looked at."""

BINARY_PROBE_BYTES = 8000
"""A file with a NUL in its first 8,000 bytes is binary, as in git."""

SIGNATURES = (
    (b"version https://git-lfs.github.com/spec/", "git-lfs pointer, not the file itself; run git lfs pull"),
    (b"%PDF-", "PDF document"),
    (b"7z\xbc\xaf\x27\x1c", "7z archive"),
    (b"Rar!\x1a\x07", "RAR archive"),
    (b"BZh", "bzip2 data; decompress it first"),
    (b"\xfd7zXZ\x00", "xz data; decompress it first"),
    (b"\x04\x22\x4d\x18", "lz4 data; decompress it first"),
    (b"\x89PNG", "PNG image"),
    (b"\xff\xd8\xff", "JPEG image"),
    (b"GIF8", "GIF image"),
    (b"{\\rtf", "RTF document"),
    (b"\xd0\xcf\x11\xe0", "old Office document"),
    (b"SQLite format 3\x00", "SQLite database"),
    (b"\x7fELF", "program"),
)
"""First bytes -> what the file is. Text files do not begin with them."""

ZIP_KINDS = {
    **dict.fromkeys((".docx", ".xlsx", ".pptx"), "Office document"),
    **dict.fromkeys((".odt", ".ods", ".odp"), "OpenDocument file"),
    ".epub": "EPUB book",
    ".whl": "Python wheel",
    ".npz": "NumPy archive",
    ".jar": "Java archive",
}
ZIP_MARKS = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
TAR_MARK = b"ustar"
TAR_MARK_AT = 257

PARQUET_MARK = b"PAR1"
ARROW_FILE_MARK = b"ARROW1"
ARROW_STREAM_MARK = b"\xff\xff\xff\xff"
GZIP_MARK = b"\x1f\x8b"
ZSTD_MARK = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL)
"""A frame, or a frame to skip, which programs that compress in parallel write first."""

FORMAT_OF_NAME: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSION_OF_NAME: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
FORMAT_NAMES = {"text": "text", "jsonl": "JSON Lines", "parquet": "a Parquet file", "arrow": "an Arrow file"}
COMPRESSION_NAMES = {"gzip": "gzip data", "zstd": "zstd data"}

TABLES_OF_TEXT = {".csv": "CSV table", ".tsv": "TSV table"}
JSON_ARRAY = "JSON array of objects; convert it: jq -c '.[]' FILE.json > FILE.jsonl"
JSON_ARRAY_BEGINNING = re.compile(rb"\s*\[\s*\{")
LARGE_JSON_NOTE = "it is JSON that is read as text, with its syntax: records are read from JSON Lines"

HF_CARD = re.compile(rb"---\r?\n(?:(?!---).*\n)*?(?:dataset_info|configs|task_categories|size_categories):")


@dataclass(frozen=True)
class Head:
    """What a file contains."""

    format: Format
    compression: Compression | None = None
    note: str = ""
    """What the content is, where the name says something else, or records may be meant."""


@dataclass(frozen=True)
class NotText:
    """A file that is not read."""

    reason: str


def inspect_head(path: Path) -> Head | NotText:
    """Return what ``path`` contains. Reads its first 64 KiB, and decompresses no more than that.

    The first bytes decide on tables and compression, and the name on JSON Lines. A file that is
    named for a table but has other first bytes keeps the format of its name, so that reading it
    fails with the cause. JSON Lines that are named ``.json`` are recognized, where the first line may
    be longer than 64 KiB. Other records that would be read as text are not read: arrays of JSON objects,
    and tables of text.

    Raises :class:`DataError` if the file cannot be read, or zstandard is needed and not installed.
    """
    with storage_errors(path), open_file(path, buffering=HEAD_BYTES) as file:
        raw = file.peek(HEAD_BYTES)
        compression = _compression_of(raw)
        content = raw if compression is None else _decompressed_head(file, compression)
    if content == b"":
        return NotText("empty")
    named_format, named_compression = _named(path)
    wrapping = f"{COMPRESSION_NAMES[compression]}: " if compression else ""
    # Damage that begins before the first byte is reported by the reader.
    found = _judge(path, content or b"", named_format, compression)
    if isinstance(found, NotText):
        return NotText(f"{wrapping}{found.reason}")
    if compression and content and found in ("parquet", "arrow"):
        return NotText(f"{wrapping}{FORMAT_NAMES[found]}; decompress it first")
    notes = []
    if compression != named_compression:
        actual = COMPRESSION_NAMES[compression] if compression else "not compressed"
        notes.append(f"it is {actual}")
    if found != named_format:
        notes.append(f"it is {FORMAT_NAMES[found]}")
    note = f"{', and '.join(notes)}, although its name does not say so" if notes else ""
    if found == "text" and plain_suffix(path.name) == ".json" and len(content or b"") >= HEAD_BYTES:
        note = note or LARGE_JSON_NOTE
    return Head(found, compression, note)


def _compression_of(raw: bytes) -> Compression | None:
    if raw.startswith(GZIP_MARK):
        return "gzip"
    return "zstd" if ZSTD_MARK.match(raw) else None


def _decompressed_head(file: io.BufferedReader, compression: Compression) -> bytes | None:
    """Return the first bytes of the content, or None if not even the first can be decompressed."""
    head = b""
    with decompressed(file, compression) as stream:
        try:
            while len(head) < HEAD_BYTES and (block := stream.read1(HEAD_BYTES - len(head))):
                head += block
        except DamagedStreamError:
            return head or None
    return head


def _named(path: Path) -> tuple[Format, Compression | None]:
    compression = COMPRESSION_OF_NAME.get(path.suffix.lower())
    return FORMAT_OF_NAME.get(plain_suffix(path.name), "text"), compression


def plain_suffix(name: str) -> str:
    """Return the suffix of a file's name in lower case, without that of a compression."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSION_OF_NAME else path.suffix


def _judge(path: Path, content: bytes, named: Format, compression: Compression | None) -> Format | NotText:
    if reason := _known_kind(path, content):
        return NotText(reason)
    if content.startswith(PARQUET_MARK):
        return "parquet"
    if content.startswith((ARROW_FILE_MARK, ARROW_STREAM_MARK)):
        return "arrow"
    if named in ("parquet", "arrow"):
        return named
    if content.startswith(UTF32_MARKS):
        return NotText("UTF-32 text; convert it to UTF-8")
    if kind := TABLES_OF_TEXT.get(plain_suffix(path.name)):
        return NotText(f"{kind}; convert it to JSON Lines or Parquet")
    if content[:2] in UTF16_MARKS:
        return named
    if b"\0" in content[:BINARY_PROBE_BYTES]:
        return NotText("binary")
    if path.name == "README.md" and HF_CARD.match(content):
        return NotText("card of a Hugging Face dataset")
    if plain_suffix(path.name) == ".json":
        return _judge_json(path, content.removeprefix(codecs.BOM_UTF8), compression)
    return named


def _known_kind(path: Path, content: bytes) -> str | None:
    for mark, kind in SIGNATURES:
        if content.startswith(mark):
            return kind
    if content.startswith(ZIP_MARKS):
        return ZIP_KINDS.get(path.suffix.lower(), "zip archive; unpack it first")
    if content[TAR_MARK_AT:].startswith(TAR_MARK):
        return "tar archive; unpack it first"
    return None


def _judge_json(path: Path, content: bytes, compression: Compression | None) -> Format | NotText:
    if JSON_ARRAY_BEGINNING.match(content):
        return NotText(JSON_ARRAY)
    first, _, rest = content.partition(b"\n")
    if not rest.strip():
        may_be_lines = content.startswith(b"{") and len(content) >= HEAD_BYTES - len(codecs.BOM_UTF8)
        return "jsonl" if may_be_lines and _begins_with_object_lines(path, compression) else "text"
    try:
        is_lines = rest.lstrip().startswith(b"{") and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        is_lines = False
    return "jsonl" if is_lines else "text"


def _begins_with_object_lines(path: Path, compression: Compression | None) -> bool:
    """Return whether the first line ends as a JSON object does and the next one begins as one.

    Reads the first line, which is not kept. Longer ones than a reader takes are not looked at.
    """
    try:
        with storage_errors(path), open_stream(path, compression)[0] as stream:
            last, left = b"", MAX_DOCUMENT_BYTES
            while left > 0 and (part := stream.readline(BLOCK_BYTES)):
                left -= len(part)
                last = part.strip() or last
                if part.endswith(b"\n"):
                    return last.endswith(b"}") and stream.read(1) == b"{"
    except DamagedStreamError:
        pass  # the reader of the file reports it
    return False
