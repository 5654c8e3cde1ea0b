"""Text to token shards: what is read, what is held out, and that a folder appears whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from support.tokenizers import make_tokenizer

from kempnerforge.data.corpus import scan_corpus
from kempnerforge.data.index import read_index
from kempnerforge.data.prepare import PIECE_BYTES, prepare, prepare_cached
from kempnerforge.data.tokenizer import ByteTokenizer, load_tokenizer
from kempnerforge.data.tokens import open_dataset
from kempnerforge.data.train_val_split import line_end_before
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
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


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


@pytest.mark.parametrize("val_fraction", [0.001, 0.5, 0.99])
def test_prepare_two_documents_one_for_each_split(tmp_path, val_fraction):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 100)
    index = prepare([str(tmp_path / "*.txt")], tmp_path / "out", BYTES, val_fraction=val_fraction)
    assert {name: split.documents for name, split in index.splits.items()} == {"train": 1, "val": 1}


def test_prepare_equal_documents_never_in_both_splits(tmp_path):
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"text {number % 4}")
    prepare([str(tmp_path / "*.txt")], tmp_path / "out", BYTES, val_fraction=0.3)
    train, val = (set(documents_of(read_split(tmp_path / "out", name))) for name in ("train", "val"))
    assert train
    assert val
    assert not train & val


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
    seen: list[tuple[int, int]] = []
    index = prepare(
        [str(tmp_path / "long.py")],
        tmp_path / "out",
        tokenizer,
        val_fraction=0.0,
        progress=lambda done, total: seen.append((done, total)),
    )
    ids = read_split(tmp_path / "out", "train")
    assert ids[-1] == tokenizer.separator_id
    assert ids[:-1].tolist() == tokenizer.encode(text).tolist()
    assert index.tokenizer_digest == tokenizer.digest
    assert seen[-1] == (len(text), len(text))


def test_line_end_before_cuts_between_characters():
    assert line_end_before(b"ab\ncd\n  ef", 0, 9) == 3
    assert line_end_before(b"ab\n cd", 0, 5) == 3
    text = "é€𝄞".encode() * 10
    for target in range(4, len(text)):
        cut = line_end_before(text, 0, target)
        assert target - 3 <= cut <= target
        text[:cut].decode()
    assert line_end_before(b"\x80" * 20, 0, 10) in range(1, 11)


def test_prepare_empty_binary_broken_files_counted(tmp_path):
    make_tokenizer(tmp_path / "tok" / "tokenizer.json")
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_bytes(b"good\n")
    (texts / "b.txt").write_bytes(b"")
    (texts / "c.png").write_bytes(b"\x89PNG\0\0data")
    (texts / "d.txt").write_bytes(b"caf\xe9\n")
    (texts / ".hidden").write_bytes(b"not me\n")
    index = prepare([str(texts)], tmp_path / "hf", load_tokenizer(str(tmp_path / "tok")), val_fraction=0.5)
    assert (index.num_empty, index.num_binary, index.num_not_utf8) == (1, 1, 1)
    assert sum(split.documents for split in index.splits.values()) == 2
    index = prepare([str(texts)], tmp_path / "bytes", BYTES, val_fraction=0.0)
    assert index.num_not_utf8 == 0
    assert documents_of(read_split(tmp_path / "bytes", "train")) == [b"good\n", b"caf\xe9\n"]


def test_scan_corpus_missing_text_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"'notes/\*\*/\*\.md' matches no file \(searched .*python-stdlib"):
        scan_corpus(["notes/**/*.md"])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"no text in empty\.txt: 1 files, 1 of them empty"):
        scan_corpus("empty.txt")
    with pytest.raises(DataError, match="no text was given"):
        scan_corpus([])
    (tmp_path / "dangling.txt").symlink_to("gone")
    with pytest.raises(DataError, match=r"dangling\.txt is a broken symbolic link"):
        scan_corpus("dangling.txt")


def test_scan_corpus_file_listed_once_by_own_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a[1].txt").write_text("bracket")
    (tmp_path / "b.txt").write_text("b")
    corpus = scan_corpus(["~/b.txt", str(tmp_path / "a[1].txt"), "~/*.txt"])
    assert [document.path.name for document in corpus.documents] == ["b.txt", "a[1].txt"]


def test_prepare_file_changes_meanwhile_refused(tmp_path):
    texts = [tmp_path / f"{name}.txt" for name in "ab"]
    for text in texts:
        text.write_bytes(b"x" * (9 << 20))  # a batch of its own

    def change(_done: int, _total: int) -> None:
        texts[1].write_bytes(b"y")

    with pytest.raises(DataError, match=r"b\.txt changed while it was being prepared"):
        prepare([str(text) for text in texts], tmp_path / "out", BYTES, val_fraction=0.0, progress=change)
    assert not (tmp_path / "out").exists()
    assert not leftovers(tmp_path)


def test_scan_corpus_standard_library_found():
    corpus = scan_corpus("python-stdlib")
    paths = {document.path.resolve() for document in corpus.documents}
    assert {Path(str(module.__file__)).resolve() for module in (json, os)} <= paths
    assert corpus.size_bytes == sum(document.size_bytes for document in corpus.documents)
    assert not any("site-packages" in document.path.parts for document in corpus.documents)
    assert len({document.path for document in corpus.documents}) == len(corpus.documents)


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


def test_prepare_cached_slower_takes_first_folder(notes, tmp_path):
    cache = tmp_path / "cache"
    inner: list[Path] = []

    def prepare_in_between(_done: int, _total: int) -> None:
        if not inner:
            inner.append(prepare_cached([str(notes)], BYTES, cache))
            inner.append(Path(str((inner[0] / "index.json").stat().st_ino)))

    outer = prepare_cached([str(notes)], BYTES, cache, progress=prepare_in_between)
    assert outer == inner[0]
    assert str((outer / "index.json").stat().st_ino) == inner[1].name, "the first folder was replaced"
    assert [path.name for path in cache.iterdir()] == [outer.name]
