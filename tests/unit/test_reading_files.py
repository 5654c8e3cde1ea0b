"""Which files a text setting names, which of them are passed over, and in which order the others are read."""

from __future__ import annotations

import errno
import json
import os
import pickle
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from kempnerforge.data.reading import heads, streams, units
from kempnerforge.data.reading.documents import read_pieces
from kempnerforge.data.reading.files import FoundFiles, digest_file, files_of, find_files
from kempnerforge.data.reading.items import Piece
from kempnerforge.data.reading.options import ReadOptions
from kempnerforge.data.reading.units import units_of
from kempnerforge.errors import DataError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for name in ("b.txt", "a/z.txt", "a/deep/er/y.md", "a-c.txt", ".hidden/x.txt", "a/.hidden.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def read_names(found: FoundFiles, root: Path) -> list[str]:
    return [str(file.path.relative_to(root)) for file in found.files]


def reasons(found: FoundFiles) -> dict[str, str]:
    return {item.path.name: item.reason for item in found.passed_over}


ALL = ["a/deep/er/y.md", "a/z.txt", "a-c.txt", "b.txt"]


def test_find_files_folder_is_sorted_without_hidden_files(tree: Path) -> None:
    found = find_files(str(tree))
    assert read_names(found, tree) == ALL
    assert [file.path for file in found.files] == sorted(file.path for file in found.files)
    assert found.passed_over == ()
    assert found.size_bytes == sum(len(name) for name in ALL)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["a-c.txt", "b.txt"]),
        ("**", ALL),
        ("**/*.txt", ["a/z.txt", "a-c.txt", "b.txt"]),
        ("**/*.md", ["a/deep/er/y.md"]),
        ("a/**/*", ["a/deep/er/y.md", "a/z.txt"]),
        ("a/**/er/*", ["a/deep/er/y.md"]),
        ("?/**/y.*", ["a/deep/er/y.md"]),
        ("[ab]*", ["a-c.txt", "b.txt"]),
        (".hidden/*", [".hidden/x.txt"]),
        ("a/.h*", ["a/.hidden.txt"]),
    ],
)
def test_find_files_glob_names_files(tree: Path, pattern: str, expected: list[str]) -> None:
    assert read_names(find_files(f"{tree}/{pattern}"), tree) == expected


def test_find_files_glob_names_folders_that_are_not_read(tree: Path) -> None:
    found = find_files(f"{tree}/*")
    assert read_names(found, tree) == ["a-c.txt", "b.txt"]
    assert reasons(found) == {"a": f"folder; to read its files, name it or {tree}/a/**"}
    found.require_text()


def test_find_files_relative_glob_searches_working_directory(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    assert [str(file.path) for file in find_files("**/*.txt").files] == ["a/z.txt", "a-c.txt", "b.txt"]


def test_find_files_keeps_order_of_entries_and_reads_each_once(tree: Path) -> None:
    found = find_files([f"{tree}/b.txt", f"{tree}/*.txt", str(tree)])
    assert read_names(found, tree) == ["b.txt", "a-c.txt", "a/deep/er/y.md", "a/z.txt"]
    assert found.passed_over == ()


def test_find_files_links_and_loops_read_once(tree: Path) -> None:
    (tree / "c_loop").symlink_to(tree)
    (tree / "a/loop").symlink_to("..")
    (tree / "0_folder").symlink_to("a")
    (tree / "self").symlink_to("self")
    (tree / "gone").symlink_to("nowhere")
    (tree / "link.txt").symlink_to("b.txt")
    os.link(tree / "b.txt", tree / "hard.txt")
    for entry in (str(tree), f"{tree}/**"):
        found = find_files(entry)
        assert read_names(found, tree) == ["0_folder/deep/er/y.md", "0_folder/z.txt", "a-c.txt", "b.txt"]
        assert reasons(found)["link.txt"] == f"already read as {tree / 'b.txt'}"
        assert reasons(found)["hard.txt"] == f"already read as {tree / 'b.txt'}"
        assert reasons(found)["gone"].startswith("broken link")
        assert reasons(found)["self"].startswith("broken link")
        found.require_text()


def test_find_files_links_to_outside_are_followed(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/out.txt").write_text("out")
    (tree / "linked").symlink_to(tmp_path / "elsewhere")
    assert "linked/out.txt" in read_names(find_files(str(tree)), tree)


def test_find_files_expands_home_and_variables(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tree))
    monkeypatch.setenv("MY_DATA", str(tree / "a"))
    assert read_names(find_files("~/b.txt"), tree) == ["b.txt"]
    for entry in ("$MY_DATA/z.txt", "${MY_DATA}/z.txt", "$MY_DATA/*.txt"):
        assert read_names(find_files(entry), tree) == ["a/z.txt"]
    monkeypatch.delenv("MY_DATA")
    for entry in ("$MY_DATA/z.txt", "${MY_DATA}/*"):
        with pytest.raises(DataError, match=r"data\.text: .*\$MY_DATA is not set; set the variable"):
            find_files(entry)


@pytest.mark.parametrize("name", ["$x.txt", "[a].txt", "what*.txt", "~"])
def test_find_files_existing_name_is_taken_literally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("x")
    Path("whatever.txt").write_text("y")
    assert [file.path.name for file in find_files(name).files] == [name]


@pytest.mark.parametrize("entry", ["missing.txt", "missing/*.txt", "**/*.none", "empty"])
def test_find_files_entry_without_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="matches no file"):
        find_files(entry)


def test_find_files_broken_link_and_no_entry_are_refused(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(DataError, match="is a broken symbolic link"):
        find_files(str(tmp_path / "gone"))
    with pytest.raises(DataError, match="no text was given"):
        find_files([])


def test_find_files_folder_without_permission_is_refused(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may read any folder, so the error is made.
    def refuse(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DataError, match=r"folder .*tree: cannot be read: Permission denied"):
        find_files(str(tree))


def test_find_files_names_what_is_no_regular_file(tree: Path) -> None:
    os.mkfifo(tree / "pipe")
    assert reasons(find_files(str(tree))) == {"pipe": "not a regular file"}


def test_require_text_nothing_left_is_refused(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(DataError, match=r"no text in .*0\.png \(PNG image\), .* and 2 more") as caught:
        find_files(str(tmp_path)).require_text()
    assert "3.png" not in str(caught.value)


@pytest.mark.parametrize(("binary_bytes", "is_refused"), [(99, False), (100, False), (101, True)])
def test_require_text_most_bytes_passed_over_is_refused(
    tmp_path: Path, binary_bytes: int, is_refused: bool
) -> None:
    (tmp_path / "README").write_bytes(b"x" * 100)
    (tmp_path / "data.bin").write_bytes(b"\0" * binary_bytes)
    (tmp_path / "link.bin").symlink_to("data.bin")
    os.link(tmp_path / "README", tmp_path / "again")
    found = find_files(str(tmp_path))
    if is_refused:
        with pytest.raises(DataError, match=r"most of .* cannot be read: .*/data\.bin \(binary\)"):
            found.require_text()
    else:
        found.require_text()


def test_find_files_stdlib_passes_over_what_is_not_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages/other.py").write_text("x")
    (tmp_path / "good.py").write_text("x = 1")
    (tmp_path / "koi8.py").write_bytes(b"# -*- coding: koi8-r -*-\n" + b"\xd0\xff" * 1000)
    (tmp_path / "sitecustomize.py").write_text("x")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    found = find_files("python-stdlib")
    assert read_names(found, tmp_path) == ["good.py"]
    assert reasons(found) == {"koi8.py": "not UTF-8"}
    found.require_text()


def test_files_of_opens_no_file(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "open_file", None)
    monkeypatch.setattr(heads, "open_file", None)
    assert [str(path.relative_to(tree)) for path in files_of(str(tree))] == ALL


def test_digest_file_is_xxh3_of_content(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 17)
    (tmp_path / "x").write_bytes(content)
    assert digest_file(tmp_path / "x") == xxhash.xxh3_128_digest(content)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        digest_file(tmp_path / "y")


def test_units_can_be_pickled(tree: Path) -> None:
    options = ReadOptions()
    units = [unit for file in find_files(str(tree)).files for unit in units_of(file, options)]
    assert pickle.loads(pickle.dumps((units, options))) == (units, options)


def test_read_options_empty_separator_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.document_separator is empty"):
        ReadOptions(document_separator="")


@pytest.mark.parametrize(("name", "package"), [("x.zst", "zstandard"), ("x.parquet", "pyarrow")])
def test_missing_package_names_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    marks = {"x.zst": b"\x28\xb5\x2f\xfd", "x.parquet": b"PAR1"}
    (tmp_path / name).write_bytes(marks[name] + b"....")
    for module in [key for key in sys.modules if key.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=r'pip install "kempnerforge\[data\]"'):
        [units_of(file, ReadOptions()) for file in find_files(str(tmp_path)).files]


def test_storage_error_while_reading_is_not_skipped(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = find_files(str(tree / "b.txt")).files
    (unit,) = units_of(file, ReadOptions())

    class Failing(streams.io.FileIO):
        def readinto(self, buffer: object) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(streams.io, "FileIO", Failing)
    with pytest.raises(DataError, match="cannot be read: Input/output error"):
        list(read_pieces(unit, ReadOptions(skip_unreadable=True)))


# Folders of Hugging Face


def write_arrow(path: Path, *documents: str) -> None:
    content = pa.table({"text": list(documents)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content)


def documents_in(found: FoundFiles) -> list[str]:
    options = ReadOptions()
    items = [
        item
        for file in found.files
        for unit in units_of(file, options)
        for item in read_pieces(unit, options)
    ]
    return [item.content.decode() for item in items if isinstance(item, Piece)]


def test_huggingface_saved_dataset_reads_listed_files(tmp_path: Path) -> None:
    write_arrow(tmp_path / "data-00000-of-00002.arrow", "a")
    write_arrow(tmp_path / "data-00001-of-00002.arrow", "b")
    write_arrow(tmp_path / "cache-0123.arrow", "mapped")
    write_arrow(tmp_path / "old.arrow", "old")
    listed = [{"filename": f"data-0000{n}-of-00002.arrow"} for n in range(2)]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": listed}))
    (tmp_path / "dataset_info.json").write_text("{}")
    found = find_files(str(tmp_path))
    assert documents_in(found) == ["a", "b"]
    assert reasons(found) == {
        "cache-0123.arrow": "result of map or filter in the cache of a Hugging Face dataset",
        "old.arrow": "not one of the data files that state.json lists",
        "state.json": "metadata of a Hugging Face dataset",
        "dataset_info.json": "metadata of a Hugging Face dataset",
    }
    found.require_text()


def test_huggingface_splits_only_train_is_read(tmp_path: Path) -> None:
    for split in ("train", "test", "validation"):
        folder = tmp_path / "saved" / split
        write_arrow(folder / "data-00000-of-00001.arrow", split)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (folder / "state.json").write_text(json.dumps(state))
        write_arrow(tmp_path / "cache" / f"my-set-{split}-00000-of-00001.arrow", split)
    splits = ["train", "test", "validation"]
    (tmp_path / "saved/dataset_dict.json").write_text(json.dumps({"splits": splits}))
    info = {"splits": {split: {"name": split} for split in splits}}
    (tmp_path / "cache/dataset_info.json").write_text(json.dumps(info))
    for folder in ("saved", "cache"):
        found = find_files(str(tmp_path / folder))
        assert documents_in(found) == ["train"]
        assert "the test split of a Hugging Face dataset; name it to read it" in reasons(found).values()
    assert documents_in(find_files(str(tmp_path / "saved/test"))) == ["test"]
    assert documents_in(find_files(str(tmp_path / "cache/*-test-*.arrow"))) == ["test"]


def test_huggingface_downloaded_splits_only_train_is_read(tmp_path: Path) -> None:
    names = ["books", "test", "train", "validation"]
    for name in names:
        content = pa.table({"text": [name]})
        pq.write_table(content, tmp_path / f"{name}-00000-of-00001.parquet")
    assert documents_in(find_files(str(tmp_path))) == ["books", "train"]
    (tmp_path / "train-00000-of-00001.parquet").unlink()
    assert documents_in(find_files(str(tmp_path))) == ["books", "test", "validation"]


def test_huggingface_download_is_read_through_snapshots(tmp_path: Path) -> None:
    repo = tmp_path / "datasets--someone--name"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("abc")
    snapshot = repo / "snapshots/abc"
    (snapshot / "data").mkdir(parents=True)
    for name, content in {
        "data/train.jsonl": '{"text": "a"}\n{"text": "b"}\n',
        "README.md": "---\nlicense: mit\nconfigs:\n- config_name: default\n---\n# Name\n",
    }.items():
        (repo / "blobs" / name.replace("/", "_")).write_text(content)
        (snapshot / name).symlink_to(repo / "blobs" / name.replace("/", "_"))
    found = find_files(str(repo))
    assert documents_in(found) == ["a", "b"]
    assert reasons(found)["README.md"] == "card of a Hugging Face dataset"
    assert reasons(found)["blobs"] == "storage of the Hub; its files are in snapshots"


def test_wrong_column_is_reported_once_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    pq.write_table(
        pa.table({"body": ["a", "b", "c"], "n": [1, 2, 3]}), tmp_path / "x.parquet", row_group_size=1
    )
    (file,) = find_files(str(tmp_path)).files
    for field, reason in (("text", 'it has no column "text"'), ("n", 'its column "n" has type int64')):
        options = ReadOptions(text_field=field, skip_unreadable=True)
        parts = units_of(file, options)
        (fault,) = [item for part in parts for item in read_pieces(part, options)]
        assert len(parts) == 3
        assert str(fault).startswith(f"{file.path}: {reason}")


def test_first_line_that_storage_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read on to tell whether the file has lines of JSON."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "I/O error")

    path = tmp_path / "long.json"
    path.write_text(json.dumps({"text": "x" * heads.HEAD_BYTES}))
    monkeypatch.setattr(heads, "open_stream", refuse)
    with pytest.raises(DataError, match=r"text file .*long\.json: cannot be read: I/O error"):
        find_files(str(path))
