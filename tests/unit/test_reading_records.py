"""Records for fine-tuning: whole JSON lines and rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kempnerforge.data.conversation import PromptCompletion
from kempnerforge.data.encoding import Encoder, TextEncoder
from kempnerforge.data.index import NAMED_LEFT_OUT
from kempnerforge.data.reading import json_lines, streams, tables, units
from kempnerforge.data.reading.documents import read_records
from kempnerforge.data.reading.files import find_files
from kempnerforge.data.reading.items import Record, Unreadable
from kempnerforge.data.reading.locations import Location, location_texts
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.reading.units import Unit, units_of
from kempnerforge.data.record_encoder import RecordEncoder
from kempnerforge.data.token_parts import Part, make_tasks, write_part
from kempnerforge.data.tokenizer import ByteTokenizer
from kempnerforge.errors import DataError

BYTES = ByteTokenizer()
SKIP = ReadOptions(skip_unreadable=True)
CHAT = {"messages": [{"role": "user", "content": "ü"}, {"role": "assistant", "content": "😀"}], "n": None}


def records_of(path: Path, options: ReadOptions = SKIP) -> list[Record | Unreadable]:
    (file,) = find_files(str(path)).files
    return [item for unit in units_of(file, options) for item in read_records(unit, options)]


def test_json_records_are_whole_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f"{json.dumps(CHAT)}\n\n{json.dumps({'prompt': 'a'})}\n")
    assert records_of(path) == [Record(CHAT, Location(path, 1)), Record({"prompt": "a"}, Location(path, 3))]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON: "),
        ("[]", "it is a list, not an object"),
        ('{"a": NaN}', "NaN is not JSON"),
        (r'{"a": ["\ud800"]}', r"an escape such as \ud800 is half of a pair"),
        (json.dumps({"a": "x" * 80}), "the line has 90 bytes; at most 0 MiB are read"),
    ],
)
def test_json_record_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, reason: str
) -> None:
    monkeypatch.setattr(json_lines, "MAX_RECORD_BYTES", 80)
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    first, fault, last = records_of(path)
    assert isinstance(fault, Unreadable)
    assert str(fault.location) == f"{path}:2"
    assert fault.reason.startswith(reason)
    assert [first, last] == [Record({"a": 1}, Location(path, 1)), Record({"a": 2}, Location(path, 3))]
    with pytest.raises(DataError, match=r"x\.jsonl:2: .*--skip-unreadable"):
        records_of(path, ReadOptions())


def test_table_records_are_whole_with_their_row(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([CHAT, {"messages": [], "n": None}]), path, row_group_size=1)
    assert records_of(path) == [
        Record(CHAT, Location(path, 1)),
        Record({"messages": [], "n": None}, Location(path, 2)),
    ]


def test_table_record_fields_that_it_lacked_are_left_out(tmp_path: Path) -> None:
    """Objects of one column have the same fields in a table."""
    records = [
        {"calls": [{"name": "add", "arguments": {"a": 1, "parts": [{"x": 1}, {"y": 2}]}}], "note": None},
        {"calls": [{"name": "now", "arguments": {"zone": "UTC"}}], "note": "x"},
    ]
    path = tmp_path / "calls.parquet"
    pq.write_table(pa.Table.from_pylist(records), path)
    assert records_of(path) == [Record(record, Location(path, row)) for row, record in enumerate(records, 1)]


def test_table_record_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_RECORD_BYTES", 100)
    path = tmp_path / "x.parquet"
    damaged = pa.array([b"a", b"\xff", b"c" * 200, b"d"]).view(pa.string())
    pq.write_table(pa.table({"prompt": damaged}), path)
    first, not_utf8, too_long, last = records_of(path)
    assert [first, last] == [
        Record({"prompt": "a"}, Location(path, 1)),
        Record({"prompt": "d"}, Location(path, 4)),
    ]
    assert isinstance(not_utf8, Unreadable)
    assert isinstance(too_long, Unreadable)
    assert str(not_utf8.location) == f"{path}:2"
    assert "it is damaged" in not_utf8.reason
    assert too_long.reason == "the row has 204 bytes; at most 0 MiB are read"


def test_records_of_text_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(DataError, match=r"x\.txt: it is text without fields; records are read from \.jsonl"):
        records_of(tmp_path / "x.txt")


@pytest.mark.parametrize(
    "created",
    [
        pa.scalar(2**62, pa.timestamp("us")),
        pa.scalar(0, pa.timestamp("us", tz="Nowhere/Land")),
    ],
)
def test_table_record_with_bad_time_is_read(tmp_path: Path, created: pa.Scalar) -> None:
    file = tmp_path / "rows.parquet"
    times = pa.array([created.value], pa.int64()).cast(created.type)
    pq.write_table(pa.table({"prompt": ["a"], "created": times}), file)
    [record] = records_of(file)
    assert isinstance(record, Record)
    assert record.value["prompt"] == "a"
    assert record.value["created"] == created.value


def test_table_record_with_bad_nested_time_is_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    times = pa.array([2**62], pa.int64()).cast(pa.timestamp("us"))
    pq.write_table(pa.table({"prompt": ["a"], "nested": pa.StructArray.from_arrays([times], ["at"])}), file)
    [record] = records_of(file)
    assert isinstance(record, Unreadable)
    assert record.location == Location(file, 1)
    assert record.reason.startswith('"nested" holds a value that Python cannot represent (')


class CountedFile(streams.io.FileIO):
    """A file that counts how often files are opened."""

    opened = 0

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        CountedFile.opened += 1


@pytest.fixture
def count_opened(monkeypatch: pytest.MonkeyPatch) -> type[CountedFile]:
    monkeypatch.setattr(streams.io, "FileIO", CountedFile)
    monkeypatch.setattr(CountedFile, "opened", 0)
    return CountedFile


@pytest.fixture
def many_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Unit]:
    """The units of 400 lines of JSON, of which every fourth is damaged."""
    monkeypatch.setattr(units, "UNIT_BYTES", 100)
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(f'{{"text": "<|x|> {n}"}}' if n % 4 else "{" for n in range(1, 401)))
    (file,) = find_files(str(path)).files
    found = units_of(file, SKIP)
    assert len(found) > 50
    return found


def test_json_records_of_units_open_file_once_each(
    many_units: list[Unit], count_opened: type[CountedFile]
) -> None:
    """The lines before a unit are not counted, or a long file would be read again for each unit."""
    path = many_units[0].file.path
    count_opened.opened = 0
    items = [item for unit in many_units for item in read_records(unit, SKIP)]
    assert count_opened.opened == len(many_units)
    texts = location_texts(item.location for item in items)
    assert count_opened.opened == len(many_units) + 1
    assert [texts[item.location] for item in items] == [f"{path}:{n}" for n in range(1, 401)]
    assert str(items[-1].location) == f"{path}:400"


@pytest.mark.parametrize(
    ("encoder", "lines"),
    [
        (TextEncoder(BYTES, SKIP), [4, 8, 12]),
        (RecordEncoder(BYTES, SKIP, PromptCompletion(BYTES, prompt_field="text")), [1, 2, 3]),
    ],
)
def test_write_part_does_not_count_lines_of_left_out(
    tmp_path: Path,
    many_units: list[Unit],
    count_opened: type[CountedFile],
    encoder: Encoder,
    lines: list[int],
) -> None:
    (task,) = make_tasks(many_units, task_bytes=1 << 20, task_units=len(many_units))
    count_opened.opened = 0
    write_part(task, encoder, tmp_path, lambda *_: None)
    assert count_opened.opened == len(many_units)
    part = Part.read(tmp_path / task.name)
    assert len(part.first_unreadable) == NAMED_LEFT_OUT
    first = location_texts(location for location, _ in part.first_unreadable)
    path = many_units[0].file.path
    assert list(first.values())[:3] == [f"{path}:{n}" for n in lines]


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_units_read_their_own_batches_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Earlier batches would be decompressed again for each unit."""
    monkeypatch.setattr(units, "UNIT_BYTES", 100)
    path = tmp_path / "x.arrow"
    content = pa.table({"text": [f"{n} " * 20 for n in range(60)], "n": range(60)})
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with new(path, content.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(content, max_chunksize=3)
    (file,) = find_files(str(path)).files
    parts = units_of(file, SKIP)
    assert len(parts) == 20
    decoded = count_batches(monkeypatch)
    records = [item for part in parts for item in read_records(part, SKIP)]
    assert [str(item.location) for item in records] == [f"{path}:{n}" for n in range(1, 61)]
    assert decoded == [3] * 20


def count_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the rows of each Arrow batch that is decoded."""
    decoded: list[int] = []

    class Reader:
        def __init__(self, reader: Any) -> None:
            self.reader = reader

        def __getattr__(self, name: str) -> Any:
            return getattr(self.reader, name)

        def __iter__(self) -> Iterator[Any]:
            while True:
                try:
                    yield self.read_next_batch()
                except StopIteration:
                    return

        def read_next_batch(self) -> Any:
            return self.counted(self.reader.read_next_batch())

        def get_batch(self, number: int) -> Any:
            return self.counted(self.reader.get_batch(number))

        def counted(self, batch: Any) -> Any:
            decoded.append(batch.num_rows)
            return batch

    for name in ("open_stream", "open_file"):
        opened = getattr(pa.ipc, name)
        monkeypatch.setattr(
            pa.ipc, name, lambda *args, opened=opened, **options: Reader(opened(*args, **options))
        )
    return decoded
