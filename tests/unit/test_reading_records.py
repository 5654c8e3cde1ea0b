"""Records for fine-tuning: whole JSON lines and rows."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kempnerforge.data.reading import json_lines, tables
from kempnerforge.data.reading.documents import read_records
from kempnerforge.data.reading.files import find_files
from kempnerforge.data.reading.items import Record, Unreadable
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.reading.units import units_of
from kempnerforge.errors import DataError

SKIP = ReadOptions(skip_unreadable=True)
CHAT = {"messages": [{"role": "user", "content": "ü"}, {"role": "assistant", "content": "😀"}], "n": None}


def records_of(path: Path, options: ReadOptions = SKIP) -> list[Record | Unreadable]:
    (file,) = find_files(str(path)).files
    return [item for unit in units_of(file, options) for item in read_records(unit, options)]


def test_json_records_are_whole_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f"{json.dumps(CHAT)}\n\n{json.dumps({'prompt': 'a'})}\n")
    assert records_of(path) == [Record(CHAT, f"{path}:1"), Record({"prompt": "a"}, f"{path}:3")]


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
    assert fault.where == f"{path}:2"
    assert fault.reason.startswith(reason)
    assert [first, last] == [Record({"a": 1}, f"{path}:1"), Record({"a": 2}, f"{path}:3")]
    with pytest.raises(DataError, match=r"x\.jsonl:2: .*--skip-unreadable"):
        records_of(path, ReadOptions())


def test_table_records_are_whole_with_their_row(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([CHAT, {"messages": [], "n": None}]), path, row_group_size=1)
    assert records_of(path) == [Record(CHAT, f"{path}:1"), Record({"messages": [], "n": None}, f"{path}:2")]


def test_table_record_fields_that_it_lacked_are_left_out(tmp_path: Path) -> None:
    """Objects of one column have the same fields in a table."""
    records = [
        {"calls": [{"name": "add", "arguments": {"a": 1, "parts": [{"x": 1}, {"y": 2}]}}], "note": None},
        {"calls": [{"name": "now", "arguments": {"zone": "UTC"}}], "note": "x"},
    ]
    path = tmp_path / "calls.parquet"
    pq.write_table(pa.Table.from_pylist(records), path)
    assert records_of(path) == [Record(record, f"{path}:{row}") for row, record in enumerate(records, 1)]


def test_table_record_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_RECORD_BYTES", 100)
    path = tmp_path / "x.parquet"
    damaged = pa.array([b"a", b"\xff", b"c" * 200, b"d"]).view(pa.string())
    pq.write_table(pa.table({"prompt": damaged}), path)
    first, not_utf8, too_long, last = records_of(path)
    assert [first, last] == [Record({"prompt": "a"}, f"{path}:1"), Record({"prompt": "d"}, f"{path}:4")]
    assert isinstance(not_utf8, Unreadable)
    assert isinstance(too_long, Unreadable)
    assert not_utf8.where == f"{path}:2"
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
    assert record.line == 1
    assert record.reason.startswith('"nested" holds a value that Python cannot represent (')
