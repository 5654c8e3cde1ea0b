"""metrics.jsonl: rows that survive kills and full disks, and which of them count."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
from pathlib import Path

import pytest

from kempnerforge.telemetry.jsonl import JsonlSink, effective_rows, read_rows


def test_jsonl_round_trip_bitwise_equal(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    draw = random.Random(7)
    values = [draw.uniform(-1, 1) * 10 ** draw.randint(-300, 300) for _ in range(200)]
    values += [math.inf, -math.inf, 5e-324, -0.0, 0.1 + 0.2]
    sink = JsonlSink(path, attempt=3)
    for step, value in enumerate(values):
        sink.write({"train/loss": value, "step": step, "data/digest": "ab12", "time": 1.5})
    sink.close()
    read = read_rows(path)
    assert read.torn == 0
    assert read.next_step() == len(values)
    assert (read.next_step(3), read.next_step(4)) == (len(values), 0)
    assert [row["train/loss"].hex() for row in read.rows] == [value.hex() for value in values]
    assert list(read.rows[0]) == ["step", "attempt", "time", "train/loss", "data/digest"]
    assert read.rows[0]["attempt"] == 3
    assert read.rows[0]["data/digest"] == "ab12"


def test_jsonl_nan_is_valid_json_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, attempt=1)
    sink.write({"step": 1, "train/loss": math.nan, "train/grad_norm": -math.inf})
    sink.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    strict = json.loads(path.read_text(), parse_constant=refuse)
    assert strict["train/loss"] == "NaN"
    assert strict["train/grad_norm"] == "-Infinity"
    assert math.isnan(read_rows(path).rows[0]["train/loss"])


def test_jsonl_torn_last_line_repaired_by_next_attempt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, attempt=1)
    sink.write({"step": 1, "train/loss": 1.0, "time": 1.0})
    assert sink.flush(60) == 0
    whole_bytes = path.stat().st_size
    sink.write({"step": 2, "note": "ä", "time": 1.0})
    sink.close()
    content = path.read_bytes()
    for size_bytes in range(whole_bytes, len(content) + 1):
        path.write_bytes(content[:size_bytes])
        sink = JsonlSink(path, attempt=2)
        sink.write({"step": 2, "time": 1.0})
        sink.write({"step": 3, "time": 1.0})
        sink.close()
        read = read_rows(path)
        # A line that lacks only its newline is a whole row.
        lost_row = size_bytes < len(content) - 1
        first_attempt = [(1, 1)] if lost_row else [(1, 1), (1, 2)]
        assert [(row["attempt"], row["step"]) for row in read.rows] == [*first_attempt, (2, 2), (2, 3)]
        assert read.torn == (1 if lost_row and size_bytes > whole_bytes else 0)
    assert caplog.messages == []


def test_jsonl_full_disk_loses_rows_with_two_warnings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, attempt=1)
    sink.write({"step": 1, "time": 1.0})
    assert sink.flush(60) == 0
    # A limit on the file's size stands in for a full disk: short writes first, then errors.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
    try:
        for step in (2, 3, 4):
            sink.write({"step": step, "time": 1.0})
        assert sink.flush(60) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    sink.write({"step": 5, "time": 1.0})
    sink.write({"step": 6, "time": 1.0})
    sink.close()
    read = read_rows(path)
    assert [row["step"] for row in read.rows] == [1, 5, 6]
    assert read.torn == 1
    lost, works_again = caplog.messages
    assert "rows are lost" in lost
    assert "3 rows are missing" in works_again


def test_jsonl_unsupported_value_refused_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, attempt=1)
    with pytest.raises(TypeError):
        sink.write({"step": 1, "train/loss": object()})
    sink.close()
    assert path.read_bytes() == b""
    assert read_rows(path).next_step() == 0


def test_jsonl_invalid_lines_counted_as_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "attempt": 1}\n\0\0\0\0\n[1, 2]\n"x"\n\xff\xfe\n\n{"step": 2, "attempt": 1}\n'
    )
    read = read_rows(path)
    assert [row["step"] for row in read.rows] == [1, 2]
    assert read.torn == 4


def test_jsonl_two_attempts_do_not_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlSink(path, 1)
    second = JsonlSink(path, 2)
    for step in range(1, 4):
        for sink in (first, second):
            sink.write({"step": step})
            assert sink.flush(60) == 0
    first.close()
    second.close()
    assert [(row["attempt"], row["step"]) for row in read_rows(path).rows] == [
        (attempt, step) for step in (1, 2, 3) for attempt in (1, 2)
    ]
    assert oct(os.stat(path).st_mode & 0o200) == "0o200"


# (attempt, first step, last step) of what was logged; attempt -> resumed step; what counts, in the same form
EFFECTIVE = {
    "one attempt": ([(1, 1, 5)], {1: 0}, [(1, 1, 5)]),
    "killed at 5, resumed from 3": ([(1, 1, 5), (2, 4, 8)], {1: 0, 2: 3}, [(1, 1, 3), (2, 4, 8)]),
    "resumed where it ended": ([(1, 1, 4), (2, 5, 6)], {1: 0, 2: 4}, [(1, 1, 4), (2, 5, 6)]),
    "killed before the first commit": ([(1, 1, 3), (2, 1, 4)], {1: 0, 2: 0}, [(2, 1, 4)]),
    "three, each going back": (
        [(1, 1, 9), (2, 7, 12), (3, 10, 15)],
        {1: 0, 2: 6, 3: 9},
        [(1, 1, 6), (2, 7, 9), (3, 10, 15)],
    ),
    "a rollback below two attempts": (
        [(1, 1, 9), (2, 7, 12), (3, 3, 5)],
        {1: 0, 2: 6, 3: 2},
        [(1, 1, 2), (3, 3, 5)],
    ),
    "an attempt that logged nothing": ([(1, 1, 5), (3, 5, 6)], {1: 0, 2: 3, 3: 4}, [(1, 1, 3), (3, 5, 6)]),
    "an attempt that never chose a step": ([(1, 1, 5), (3, 6, 7)], {1: 0, 3: 5}, [(1, 1, 5), (3, 6, 7)]),
    "nothing": ([], {1: 0}, []),
}


@pytest.mark.parametrize("case", EFFECTIVE)
def test_effective_rows_table_matches(case: str) -> None:
    def rows(spans: list[tuple[int, int, int]]) -> list[dict[str, int]]:
        return [
            {"attempt": attempt, "step": step}
            for attempt, first, last in spans
            for step in range(first, last + 1)
        ]

    logged, resumes, counting = EFFECTIVE[case]
    assert effective_rows(rows(logged), resumes) == rows(counting)
