"""Text to token shards: what is read, what is held out, and that a folder appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import random
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.tokenizers import make_tokenizer

from kempnerforge.data import prepare as prepare_module
from kempnerforge.data.index import Index, json_digest, read_index
from kempnerforge.data.prepare import prepare, prepare_cached, turn_end_warnings
from kempnerforge.data.prepare_progress import Progress, plain_lines
from kempnerforge.data.prepare_workers import helpers_of_workers
from kempnerforge.data.reading.files import TextFile, find_files
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.reading.pieces import PIECE_BYTES
from kempnerforge.data.reading.streams import storage_errors
from kempnerforge.data.reading.units import Unit, units_of
from kempnerforge.data.token_parts import Task, make_tasks
from kempnerforge.data.tokenizer import ByteTokenizer, load_tokenizer
from kempnerforge.data.tokens import open_dataset
from kempnerforge.errors import DataError

pytest_plugins = ["support.text_fixtures"]

BYTES = ByteTokenizer()


def read_split(folder: Path, split: str) -> np.ndarray:
    index = read_index(folder)
    return np.concatenate(
        [np.fromfile(folder / shard.file, dtype=index.dtype) for shard in index.splits[split].shards]
    )


def documents_of(ids: np.ndarray) -> list[bytes]:
    """The documents of a split of byte tokens, in order."""
    *documents, rest = np.split(ids, np.flatnonzero(ids == 256) + 1)
    assert rest.size == 0, "the last document is separated too"
    return [document[:-1].astype(np.uint8).tobytes() for document in documents]


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_prepare_documents_once_in_order_separated(notes, tmp_path):
    index = prepare([str(notes)], tmp_path / "out", BYTES, val_fraction=0.1)
    files = sorted(path for path in notes.rglob("*.md"))
    train, val = (documents_of(read_split(tmp_path / "out", name)) for name in ("train", "val"))
    expected = [path.read_bytes() for path in files]
    assert sorted(train + val) == sorted(expected)
    assert train == [document for document in expected if document in train]
    assert val == [document for document in expected if document in val]
    assert 5 <= len(val) <= 40  # which documents are held out depends on their bytes alone
    assert index == read_index(tmp_path / "out")
    assert (index.splits["train"].documents, index.splits["val"].documents) == (len(train), len(val))
    assert index.dtype == "uint16"


def test_prepare_same_text_same_bytes(notes, tmp_path):
    first = prepare([str(notes / "**/*.md")], tmp_path / "first", BYTES)
    second = prepare([str(notes)], tmp_path / "second", BYTES)
    assert first == second
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()


def test_prepare_shard_size_does_not_change_digest(notes, tmp_path):
    whole = prepare([str(notes)], tmp_path / "whole", BYTES)
    cut = prepare([str(notes)], tmp_path / "cut", BYTES, shard_tokens=1000)
    shards = cut.splits["train"].shards
    assert [shard.tokens for shard in shards[:-1]] == [1000] * (len(shards) - 1)
    assert len(shards) > 5
    assert sum(shard.documents for shard in shards) == cut.splits["train"].documents
    assert cut.digest == whole.digest
    for split in ("train", "val"):
        assert (read_split(tmp_path / "cut", split) == read_split(tmp_path / "whole", split)).all()


def test_prepare_document_filling_shard_counted_in_it(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 9)
    index = prepare([str(tmp_path / "*.txt")], tmp_path / "out", BYTES, val_fraction=0.0, shard_tokens=10)
    assert [(shard.tokens, shard.documents) for shard in index.splits["train"].shards] == [(10, 1)] * 3


def test_prepare_added_documents_keep_val_split(notes, tmp_path):
    prepare([str(notes)], tmp_path / "before", BYTES, val_fraction=0.1)
    for number in range(50):
        (notes / f"more{number}.md").write_text(f"another {number}\n")
    prepare([str(notes)], tmp_path / "after", BYTES, val_fraction=0.1)
    before, after = (set(documents_of(read_split(tmp_path / name, "val"))) for name in ("before", "after"))
    assert before <= after


def test_prepare_single_document_cut_at_line_end(tmp_path):
    text = "".join(f"line {number}\n" for number in range(1000)).encode()
    (tmp_path / "one.txt").write_bytes(text)
    prepare(str(tmp_path / "one.txt"), tmp_path / "out", BYTES, val_fraction=0.1)
    train, val = (documents_of(read_split(tmp_path / "out", name))[0] for name in ("train", "val"))
    assert train + val == text
    assert train.endswith(b"\n")
    assert 0.09 < len(val) / len(text) < 0.12


def test_prepare_zero_fraction_has_no_val_split(notes, tmp_path):
    index = prepare([str(notes)], tmp_path / "out", BYTES, val_fraction=0.0)
    assert set(index.splits) == {"train"}
    with pytest.raises(DataError, match=r"no val split.*--val-fraction"):
        open_dataset(tmp_path / "out").split("val", 8)


def test_prepare_long_document_pieces_equal_whole(tmp_path):
    make_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(str(tmp_path))
    text = "".join(f"def f{n}(x):\n    return x + {n}\n\n\n" for n in range(20_000))
    assert len(text) > 2 * PIECE_BYTES
    (tmp_path / "long.py").write_text(text)
    seen: list[Progress] = []
    index = prepare(
        [str(tmp_path / "long.py")],
        tmp_path / "out",
        tokenizer,
        val_fraction=0.0,
        progress=seen.append,
    )
    ids = read_split(tmp_path / "out", "train")
    assert ids[-1] == tokenizer.separator_id
    assert ids[:-1].tolist() == tokenizer.encode(text).tolist()
    assert index.tokenizer_digest == tokenizer.digest
    last = [progress for progress in seen if progress.activity == "tokenized"][-1]
    assert (last.done_bytes, last.total_bytes, last.text_bytes) == (len(text),) * 3
    assert last.tokens == ids.size
    assert "MB/s" in last.rate


def test_prepare_reports_each_activity_to_its_end(notes: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    index = prepare([str(notes)], tmp_path / "out", BYTES, val_fraction=0.1, progress=seen.append)
    last = {progress.activity: progress for progress in seen}
    assert list(last) == ["found", "read", "tokenized", "wrote"]
    text_bytes = sum(split.text_bytes or 0 for split in index.splits.values())
    token_bytes = 2 * sum(split.tokens for split in index.splits.values())
    done = [(progress.done_bytes, progress.total_bytes) for progress in last.values()]
    assert done == [(text_bytes, 0), (text_bytes,) * 2, (text_bytes,) * 2, (token_bytes,) * 2]
    for activity in last:
        so_far = [progress.done_bytes for progress in seen if progress.activity == activity]
        assert so_far == sorted(so_far)


def test_plain_lines_each_activity_at_the_same_rate() -> None:
    """The first line comes after 10 s, so a small corpus has none."""
    now, lines = [0.0], []
    write = plain_lines(lines.append, clock=lambda: now[0])
    for now_s, progress in (
        (1, Progress("found", 10, 0, 10, 0, 1.0)),
        (9, Progress("read", 10, 5000, 10, 0, 1.0)),
        (11, Progress("found", 4000, 0, 4000, 0, 10.0)),
        (12, Progress("read", 10, 5000, 10, 0, 1.0)),
        (21, Progress("read", 2000, 5000, 2000000, 0, 2.0)),
        (31, Progress("tokenized", 3000, 5000, 9000000, 6000000, 2.0)),
        (40, Progress("wrote", 3000, 5000, 9000000, 0, 2.0)),
        (41, Progress("wrote", 4000, 5000, 9000000, 0, 2.0)),
    ):
        now[0] = now_s
        write(progress)
    assert lines == [
        "found files of 4,000 bytes",
        "read 2,000 of 5,000 bytes, 1.0 MB/s",
        "tokenized 3,000 of 5,000 bytes, 4.5 MB/s, 3.00M tokens/s",
        "wrote tokens: 4,000 of 5,000 bytes, 4.5 MB/s",
    ]


def test_found_files_and_tasks_need_little_memory(tmp_path: Path) -> None:
    """A corpus may have a million files."""
    for number in range(3000):
        (tmp_path / f"{number:06d}.txt").write_text("text")
    (tmp_path / "other").mkdir()
    find_files(str(tmp_path / "000000.txt"))  # what is imported and cached at the first use
    tracemalloc.start()
    try:
        found = find_files(str(tmp_path))
        units = (unit for file in found.files for unit in units_of(file, ReadOptions()))
        tasks = list(make_tasks(units, 4 << 20, 1000))
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    names = sum(len(file.name) for file in found.files)
    assert [len(task.units) for task in tasks] == [1000] * 3
    assert (kept - names) / 3000 < 350
    assert (most - names) / 3000 < 600


def test_make_tasks_by_bytes_and_units() -> None:
    sizes = [3, 3, 9, 1, 1, 1, 1]
    units = [
        Unit(TextFile("a.txt", "text", None, size, 0), number, 0, None, size)
        for number, size in enumerate(sizes)
    ]
    tasks = list(make_tasks(units, 5, 3))
    assert [[unit.number for unit in task.units] for task in tasks] == [[0, 1], [2], [3, 4, 5], [6]]
    assert [(task.name, task.size_bytes) for task in tasks[:2]] == [("part_000000", 6), ("part_000001", 9)]
    assert list(make_tasks([], 5, 3)) == []


@pytest.mark.parametrize("count", [0, 1, 3])
def test_json_digest_list_in_parts_is_the_same(count: int) -> None:
    value = {"format": 2, "encoder": {"b": [1, None], "a": "é"}, "z": 0.01}
    files = [["0f", "text", None], ["1f", "jsonl", "gzip"], ["2f", "text", "zstd"]][:count]
    assert json_digest(value, files=iter(files)) == json_digest({**value, "files": files})


def test_prepare_non_empty_folder_untouched(notes, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="not an empty folder"):
        prepare([str(notes)], out, BYTES)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    prepare([str(notes)], out, BYTES)
    assert open_dataset(out).vocab_size == 257


@pytest.mark.parametrize("name", [".", ".."])
def test_prepare_folder_without_name_refused(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    inner = tmp_path / "empty" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner if name == "." else inner.parent)
    with pytest.raises(DataError, match="is no name of a folder to create"):
        prepare([str(notes)], Path(name), BYTES)
    assert not any(inner.iterdir())


def test_prepare_cached_keyed_by_content(notes, tmp_path):
    cache = tmp_path / "cache"
    first = prepare_cached([str(notes)], BYTES, cache)
    made = (first / "index.json").stat()
    assert prepare_cached([str(notes)], BYTES, cache) == first
    found = (first / "index.json").stat()
    assert (found.st_ino, found.st_mtime_ns) == (made.st_ino, made.st_mtime_ns), "it was prepared again"
    assert prepare_cached([str(notes)], BYTES, cache, val_fraction=0.2) != first
    make_tokenizer(tmp_path / "tokenizer.json")
    assert prepare_cached([str(notes)], load_tokenizer(str(tmp_path)), cache) != first

    one = notes / "part0" / "000.md"
    times = one.stat()
    one.write_bytes(one.read_bytes().swapcase())
    os.utime(one, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert prepare_cached([str(notes)], BYTES, cache) != first
    assert not leftovers(cache)


def test_prepare_cached_folder_without_index_refused(notes: Path, tmp_path: Path) -> None:
    folder = prepare_cached([str(notes)], BYTES, tmp_path / "cache")
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match=f"{folder} is damaged: it has no index.json. Delete it"):
        prepare_cached([str(notes)], BYTES, tmp_path / "cache")
    assert not leftovers(folder.parent)


def test_prepare_storage_that_does_not_answer_keeps_parts(
    notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_tasks: Any, _encoder: Any, parts: Path, **_: Any) -> None:
        (parts / "part_000000").mkdir()
        with storage_errors(notes):
            raise OSError(errno.EIO, "Input/output error")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_parts", fail)
        with pytest.raises(DataError, match="Input/output error; finished parts"):
            prepare([str(notes)], out, BYTES)
    [parts] = leftovers(tmp_path)
    assert [path.name for path in (tmp_path / parts).iterdir()] == ["part_000000"]
    (tmp_path / parts / "part_000000").rmdir()
    prepare([str(notes)], out, BYTES)
    assert not leftovers(tmp_path)


def test_prepare_cached_slower_takes_first_folder(notes, tmp_path):
    cache = tmp_path / "cache"
    inner: list[Path] = []

    def prepare_in_between(progress: Progress) -> None:
        if progress.activity == "tokenized" and not inner:
            inner.append(prepare_cached([str(notes)], BYTES, cache))
            inner.append(Path(str((inner[0] / "index.json").stat().st_ino)))

    outer = prepare_cached([str(notes)], BYTES, cache, progress=prepare_in_between)
    assert outer == inner[0]
    assert str((outer / "index.json").stat().st_ino) == inner[1].name, "the first folder was replaced"
    assert [path.name for path in cache.iterdir()] == [outer.name]


def jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def held_out_share(index: Index) -> float:
    sizes = {name: split.text_bytes or 0 for name, split in index.splits.items()}
    return sizes.get("val", 0) / sum(sizes.values())


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([2_000_000, 500], id="a book and a note"),
        pytest.param([1_000_000] * 2, id="two shards"),
        pytest.param([700_000, 900_000, 300_000, 500_000], id="four shards"),
        pytest.param([60_000], id="one file"),
        pytest.param([3000] * 9, id="few small files"),
        pytest.param([1000 + 50 * (n % 40) for n in range(600)], id="many small files"),
    ],
)
def test_prepare_share_of_bytes_within_a_tenth(tmp_path: Path, sizes: list[int]) -> None:
    lines = "".join(f"line {number} of a text\n" for number in range(100_000))
    for number, size in enumerate(sizes):
        (tmp_path / f"{number:03d}.txt").write_text(f"{number}\n" + lines[:size])
    index = prepare([str(tmp_path / "*.txt")], tmp_path / "out", BYTES)
    assert 0.009 <= held_out_share(index) <= 0.011
    val = documents_of(read_split(tmp_path / "out", "val"))
    assert sum(map(len, val)) == index.splits["val"].text_bytes


@given(
    small=st.tuples(st.integers(0, 500), st.integers(20, 1000)),
    larger=st.lists(st.integers(1000, 50_000), max_size=5),
    huge=st.lists(st.integers(50_000, 1_000_000), max_size=3),
    fraction=st.sampled_from([0.003, 0.01, 0.05, 0.2]),
    seed=st.integers(0, 10_000),
)
@example(small=(400, 500), larger=[], huge=[800_000], fraction=0.01, seed=1)
@settings(deadline=None, max_examples=40)
def test_prepare_share_with_huge_documents_within_a_tenth(
    small: tuple[int, int], larger: list[int], huge: list[int], fraction: float, seed: int
) -> None:
    """Where so few bytes are to be held out that a token is many of them, it may be refused."""
    count, size = small
    sizes = [*huge, *larger, *[size] * count]
    random.Random(seed).shuffle(sizes)
    line = "some words of a line\n"
    texts = [f"{seed} {number} {line * (length // len(line))}" for number, length in enumerate(sizes)]
    with tempfile.TemporaryDirectory() as folder:
        path = jsonl(Path(folder) / "a.jsonl", texts or ["empty"])
        share, refusal = fraction, ""
        try:
            share = held_out_share(prepare([str(path)], Path(folder) / "out", BYTES, val_fraction=fraction))
        except DataError as error:
            refusal = str(error)
    assert 0.9 * fraction <= share <= 1.1 * fraction
    assert not refusal or ("too little text" in refusal and fraction * sum(map(len, texts)) < 100)


def test_prepare_too_little_text_to_hold_out_refused(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("ten bytes\n")
    with pytest.raises(DataError, match=r"too little text to hold out val_fraction = 0\.01 of 10 bytes"):
        prepare([str(tmp_path / "one.txt")], tmp_path / "out", BYTES)
    assert not leftovers(tmp_path)
    assert not (tmp_path / "out").exists()


def test_prepare_records_added_file_keeps_both_splits(tmp_path: Path) -> None:
    """What is held out of a file of many documents depends on that file alone."""
    texts = [f"document {number} " * (1 + number % 9) for number in range(4000)]
    jsonl(tmp_path / "a.jsonl", texts)
    prepare([str(tmp_path / "*.jsonl")], tmp_path / "before", BYTES, val_fraction=0.05)
    jsonl(tmp_path / "b.jsonl", [f"other {number} " * 3 for number in range(3000)])
    prepare([str(tmp_path / "*.jsonl")], tmp_path / "after", BYTES, val_fraction=0.05)
    mine = {text.encode() for text in texts}
    for split in ("train", "val"):
        before, after = (
            [text for text in documents_of(read_split(tmp_path / name, split)) if text in mine]
            for name in ("before", "after")
        )
        assert before == after
    assert 150 <= len(before) <= 250


def test_prepare_equal_small_documents_in_the_same_split(tmp_path: Path) -> None:
    for number in range(1200):
        (tmp_path / f"{number}.txt").write_text(f"text {number % 300}\n")
    prepare([str(tmp_path / "*.txt")], tmp_path / "out", BYTES, val_fraction=0.3)
    train, val = (set(documents_of(read_split(tmp_path / "out", name))) for name in ("train", "val"))
    assert len(train) + len(val) == 300
    assert val
    assert not train & val


def test_prepare_ends_and_format_of_shards(notes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    index = prepare([str(notes)], out, BYTES, shard_tokens=500, val_fraction=0.1)
    for split in index.splits.values():
        for shard in split.shards:
            ids = np.fromfile(out / shard.file, dtype=index.dtype)
            ends = np.fromfile(out / shard.ends_file, dtype="<u8")
            assert (ends == np.flatnonzero(ids == 256) + 1).all()
            assert ends.size == shard.documents
            assert not (out / shard.counted_file).exists()
    assert json.loads((out / "index.json").read_text())["format"] == 2


def test_read_index_format_1_has_same_digest(notes: Path, tmp_path: Path) -> None:
    """A folder of the earlier version is read, and a run on it resumes."""
    out = tmp_path / "out"
    index = prepare([str(notes)], out, BYTES)
    content = json.loads((out / "index.json").read_text())
    for name in ("passed_over", "unreadable", "text"):
        del content[name]
    for split in content["splits"].values():
        for name in ("ends_digest", "counted_digest", "counted", "text_bytes"):
            del split[name]
        for shard in split["shards"]:
            del shard["ends_digest"], shard["counted_digest"]
            (out / shard["file"]).with_suffix(".ends").unlink()
    content |= {"format": 1, "num_empty": 2, "num_binary": 0, "num_not_utf8": 1}
    (out / "index.json").write_text(json.dumps(content))
    old = read_index(out)
    assert old.digest == index.digest == content["digest"]
    assert old.passed_over.counts == {
        "empty files": 2,
        "documents that are not UTF-8, invalid bytes replaced": 1,
    }
    open_dataset(out, verify=True)


def test_prepare_left_out_is_counted_and_named(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    jsonl(texts / "a.jsonl", ["one", "two", "three", "four"])
    with (texts / "a.jsonl").open("ab") as file:
        file.write(b'{"title": "no text"}\n{"text": \n')
    (texts / "empty.txt").touch()
    (texts / "image").write_bytes(b"\0\1\2" * 10)
    with pytest.raises(DataError, match=r"a\.jsonl:5: .*--skip-unreadable"):
        prepare([str(texts)], tmp_path / "out", BYTES, val_fraction=0.0)
    assert not leftovers(tmp_path)
    options = ReadOptions(skip_unreadable=True)
    index = prepare([str(texts)], tmp_path / "out", BYTES, options=options, val_fraction=0.0)
    assert index == read_index(tmp_path / "out")
    assert index.passed_over.counts == {"empty": 1, "binary": 1}
    assert [Path(where).name for where, _ in index.passed_over.first] == ["empty.txt", "image"]
    assert index.unreadable.total == 2
    assert [Path(where).name for where, _ in index.unreadable.first] == ["a.jsonl:5", "a.jsonl:6"]
    assert documents_of(read_split(tmp_path / "out", "train")) == [b"one", b"two", b"three", b"four"]


def test_prepare_most_records_unreadable_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["one"])
    with path.open("a") as file:
        file.write('{"body": "x"}\n' * 30)
    options = ReadOptions(skip_unreadable=True)
    with pytest.raises(DataError, match=r"most of the text cannot be read: 1 documents .* 30 were not"):
        prepare([str(path)], tmp_path / "out", BYTES, options=options, val_fraction=0.0)


def test_prepare_bos_begins_each_document(tmp_path: Path) -> None:
    tokenizer_file = tmp_path / "tok" / "tokenizer.json"
    made = make_tokenizer(tokenizer_file)
    tokenizer = load_tokenizer(str(tokenizer_file), bos="<begin>")
    jsonl(tmp_path / "a.jsonl", ["hello", "x = 1\n" * 3000])
    index = prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer, val_fraction=0.2)
    bos, eos = made.token_to_id("<begin>"), made.token_to_id("</s>")
    for split in ("train", "val"):
        ids = read_split(tmp_path / "out", split)
        assert ids[0] == bos
        assert ids[-1] == eos
        begins, ends = np.flatnonzero(ids == bos), np.flatnonzero(ids == eos)
        assert (begins[1:] == ends[:-1] + 1).all(), "the part after a cut begins with it too"
    assert (index.text.bos_token, index.text.bos_id) == ("<begin>", bos)
    assert "\n" in made.decode(read_split(tmp_path / "out", "val").tolist())


def test_prepare_literal_separator_warns_without_option(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("once\n<|endoftext|>\nupon\n" * 100)
    index = prepare([str(tmp_path / "stories.txt")], tmp_path / "one", BYTES)
    assert "stories.txt contains the text <|endoftext|>" in index.text.warnings[0]
    options = ReadOptions(document_separator="<|endoftext|>")
    index = prepare(
        [str(tmp_path / "stories.txt")], tmp_path / "many", BYTES, options=options, val_fraction=0.0
    )
    assert not index.text.warnings
    assert index.splits["train"].documents == 101


def test_prepare_instruct_config_warns_of_turn_end(tmp_path: Path) -> None:
    made = make_tokenizer(tmp_path / "tok" / "tokenizer.json", eos="<|eot_id|>")
    made.add_special_tokens(["<|end_of_text|>"])
    made.save(str(tmp_path / "tok" / "tokenizer.json"))
    (tmp_path / "tok" / "tokenizer_config.json").write_text('{"eos_token": "<|eot_id|>"}')
    (warning,) = turn_end_warnings(load_tokenizer(str(tmp_path / "tok")))
    assert "tokenizer_config.json names" in warning
    assert "<|end_of_text|>" in warning
    assert not turn_end_warnings(load_tokenizer(str(tmp_path / "tok"), eos="<|eot_id|>"))


@pytest.mark.parametrize(
    "changed",
    [
        {"options": ReadOptions(text_field="body", skip_unreadable=True)},
        {"options": ReadOptions(document_separator="---")},
        {"options": ReadOptions(skip_unreadable=True)},
        {"val_fraction": 0.2},
    ],
)
def test_prepare_cached_key_has_options(notes: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    cache = tmp_path / "cache"
    assert prepare_cached([str(notes)], BYTES, cache) != prepare_cached([str(notes)], BYTES, cache, **changed)


def test_prepare_cached_logs_what_was_left_out(
    notes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for start in range(2):
        (notes / f"empty{start}.md").touch()
        caplog.clear()
        prepare_cached([str(notes)], BYTES, tmp_path / "cache")
        assert f"left out: {start + 1} x empty" in caplog.text, "at every start, as it is then"


@pytest.mark.parametrize(
    ("sizes_mb", "num_processes", "expected"),
    [
        pytest.param([4] * 100, 8, [0] * 8, id="a large divided file"),
        pytest.param([1000], 8, [8], id="one file that cannot be divided"),
        pytest.param([1000], 1, [0], id="one processor"),
        pytest.param([10], 64, [3], id="one file that is not so large"),
        pytest.param([4, 4, 1], 64, [0] * 3, id="small text"),
        pytest.param([1000, 500, 20], 8, [5, 3], id="a few large files"),
        pytest.param([50_000, *[10] * 1000], 8, [7, 0], id="a large file and many small ones"),
        pytest.param([400, 4, 4], 4, [4], id="a large file and a few small ones"),
        pytest.param([0, 0], 4, [0, 0], id="empty files"),
        pytest.param([1000] * 9, 8, [0] * 8, id="more large files than processors"),
    ],
)
def test_helpers_of_workers_use_all_processors(
    sizes_mb: list[int], num_processes: int, expected: list[int]
) -> None:
    tasks = [Task(number, (), size << 20) for number, size in enumerate(sizes_mb)]
    assert helpers_of_workers(tasks, num_processes) == expected
