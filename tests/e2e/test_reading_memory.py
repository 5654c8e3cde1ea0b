"""Files of any size are read in bounded memory, and a dataset that ``datasets`` saved is read."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

MB = 1 << 20
MAX_BYTES = 200 * 1000 * 1000
READ = """
import json, sys

def peak():
    # Unlike ru_maxrss, it begins anew with the program.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

before = peak()
from kempnerforge.data.reading.documents import read_pieces
from kempnerforge.data.reading.files import digest_file, find_files
from kempnerforge.data.reading.items import Unreadable
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.reading.units import units_of

options = ReadOptions(skip_unreadable=True, document_separator=sys.argv[2] or None)
found = find_files(sys.argv[1])
size, documents, faults = 0, 0, []
for file in found.files:
    digest_file(file.path)
    for unit in units_of(file, options):
        for item in read_pieces(unit, options):
            if isinstance(item, Unreadable):
                faults.append(str(item))
            else:
                size += len(item.content)
                documents += item.ends_document
names = [item.path.name for item in found.passed_over]
print(json.dumps([peak() - before, size, documents, faults, names]))
"""


def read(folder: Path, separator: str = "") -> tuple[int, int, list[str], list[str]]:
    """Bytes and number of the documents, what is unreadable and what is passed over."""
    ended = subprocess.run(
        [sys.executable, "-c", READ, str(folder), separator],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    peak, size, documents, faults, passed_over = json.loads(ended.stdout)
    print(f"peak {peak / 1e6:.0f} MB")
    assert peak < MAX_BYTES
    return size, documents, faults, passed_over


def write(path: Path, *parts: bytes, times: int = 1) -> int:
    with path.open("wb") as file:
        for _ in range(times):
            for part in parts:
                file.write(part)
        return file.tell()


def test_reading_sparse_image_beside_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with (tmp_path / "disk.img").open("wb") as file:
        file.truncate(8 << 30)
    assert read(tmp_path) == (4, 1, [], ["disk.img"])


@pytest.mark.parametrize("separator", ["", "\n---\n"])
def test_reading_text_of_one_line(tmp_path: Path, separator: str) -> None:
    size = write(tmp_path / "a.txt", "漢".encode() * 100_000, times=1000)
    assert read(tmp_path, separator) == (size, 1, [], [])


def test_reading_json_line_that_is_too_long_is_passed(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range(300):
            file.write(b"x" * MB)
        file.write(b'"}\n{"text": "b"}\n')
    size, documents, (fault,), _ = read(tmp_path)
    assert (size, documents) == (2, 2)
    assert fault.endswith("a.jsonl:2: the line has 314,572,813 bytes; at most 64 MiB are read")


@pytest.mark.parametrize(
    "text",
    [
        "a" * (63 * MB) + "😀",
        "a" * (63 * MB) + r"\ud83d\ude00\ud800",
        r"\ud83d\ude00" * (5 * MB),
        r"a\n" * (20 * MB),
        "漢" * (20 * MB),
    ],
    ids=["emoji", "lone", "escapes", "lines", "chinese"],
)
def test_reading_long_json_line(tmp_path: Path, text: str) -> None:
    write(tmp_path / "a.jsonl", b'{"text": "', text.encode(), b'"}')
    expected = b"" if "d800" in text else json.loads(f'"{text}"').encode()
    size, documents, faults, _ = read(tmp_path)
    assert (size, documents, len(faults)) == (len(expected), bool(expected), not expected)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.jsonl.gz", "a.jsonl.zst"])
def test_reading_compressed_text_that_is_large(tmp_path: Path, name: str) -> None:
    compress = gzip.compress if name.endswith("gz") else zstandard.compress
    content = compress(b"x" * (50 * MB)) * 8
    write(tmp_path / name, content)
    size, documents, faults, _ = read(tmp_path)
    if "jsonl" in name:
        assert (size, documents, len(faults)) == (0, 0, 1)
    else:
        assert (size, documents, faults) == (400 * MB, 1, [])


def write_table(path: Path, kind: str, table: pa.Table) -> None:
    if kind == "parquet":
        # pyarrow decompresses a page at a time, and ends one after write_batch_size rows at the earliest.
        pq.write_table(table, path, row_group_size=1 << 30, use_dictionary=False, write_batch_size=1)
        return
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_reading_table_of_one_row_group(tmp_path: Path, kind: str) -> None:
    documents = [f"{n} " * 200_000 for n in range(300)]
    table = pa.table({"text": pa.array(documents, pa.large_string()), "blob": [b"y" * MB] * 300})
    write_table(tmp_path / f"a.{'parquet' if kind == 'parquet' else 'arrow'}", kind, table)
    assert read(tmp_path) == (sum(map(len, documents)), 300, [], [])


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_reading_table_with_long_cell(tmp_path: Path, kind: str) -> None:
    documents = ["a", "é" * (31 * MB), "b" * (65 * MB), "c"]
    write_table(tmp_path / "a.arrow", kind, pa.table({"text": documents}))
    size, count, (fault,), _ = read(tmp_path)
    assert (size, count) == (62 * MB + 2, 3)
    assert fault.endswith(":3: the text has 68,157,440 bytes; at most 64 MiB are read")


MAKE_DATASETS = """
import sys, datasets
files = {"train": "train.jsonl", "test": "test.jsonl"}
data = datasets.load_dataset("json", data_files=files, cache_dir="cache")
data["train"].map(lambda record: {"text": record["text"].upper()})
data.save_to_disk("saved")
data["train"].filter(lambda record: record["id"] % 2 == 0).save_to_disk("filtered")
"""


def test_reading_folders_that_datasets_wrote(tmp_path: Path) -> None:
    for split in ("train", "test"):
        lines = [json.dumps({"text": f"{split} {n}", "id": n}) + "\n" for n in range(4)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", MAKE_DATASETS], cwd=tmp_path, env=environment, check=True)
    for folder, documents in (("cache", 4), ("saved", 4), ("filtered", 2)):
        size, count, faults, passed_over = read(tmp_path / folder)
        assert (size, count, faults) == (documents * len("train 0"), documents, [])
        assert "dataset_info.json" in passed_over or folder == "saved"
