"""Of folders with several splits or revisions, only what is to be trained on is read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kempnerforge.data.prepare import prepare
from kempnerforge.data.reading.files import FoundFiles, find_files
from kempnerforge.data.tokenizer import ByteTokenizer
from kempnerforge.errors import DataError

RECORDS = '{"text": "a"}\n{"text": "b"}\n'


def write(folder: Path, *names: str, content: str = RECORDS) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.table({"text": [name]}), path)
        else:
            path.write_text(content)


def read_names(found: FoundFiles, root: Path) -> list[str]:
    return sorted(str(file.path.relative_to(root)) for file in found.files)


ULTRACHAT = [f"{split}-00000-of-00001-0123456789abcdef.parquet" for split in ("train_sft", "train_gen")]
ULTRACHAT_TESTS = [name.replace("train", "test") for name in ULTRACHAT]


@pytest.mark.parametrize(
    ("read", "left_out"),
    [
        (ULTRACHAT, {"test_sft": ULTRACHAT_TESTS[0], "test_gen": ULTRACHAT_TESTS[1]}),
        (["train.jsonl"], {"test": "test.jsonl", "validation": "validation.jsonl"}),
        (["train.jsonl.gz", "books.jsonl"], {"dev": "dev.ndjson"}),
        (["train.parquet"], {"test": "test.parquet"}),
        (["Train.jsonl", "train_2.jsonl", "train-v2.jsonl"], {"Valid": "Valid.jsonl"}),
        (["train1.jsonl", "train2.jsonl"], {"test": "test1.jsonl"}),
        (["training.json"], {"testing": "testing.json"}),
        (["train.txt"], {"valid": "valid.txt"}),
        (["c4-train.00000-of-00002.json"], {"c4-validation": "c4-validation.00000-of-00001.json"}),
        (["train/en/0000.parquet"], {"test": "test"}),
    ],
)
def test_splits_held_out_beside_train_are_not_read(
    tmp_path: Path, read: list[str], left_out: dict[str, str]
) -> None:
    write(
        tmp_path, *read, *(f"{name}/0000.parquet" if name == "test" else name for name in left_out.values())
    )
    found = find_files(str(tmp_path))
    assert read_names(found, tmp_path) == sorted(read)
    assert {item.path.name: item.reason for item in found.passed_over} == {
        name: f"the {split} split beside a train split; name it to read it"
        for split, name in left_out.items()
    }
    found.require_text()
    for name in left_out.values():
        assert find_files(str(tmp_path / name)).files


@pytest.mark.parametrize(
    ("names", "content"),
    [
        (["train.py", "eval.py", "test_train.py"], "x = 1\n"),
        (["train.json", "eval.json"], '{"lr": 0.1}\n'),
        (["train/run.py", "test/cases.jsonl"], "x = 1\n"),
        (["train/cases.jsonl", "test/run.py"], "x = 1\n"),
        (["train.md", "test.md"], "about\n"),
        (["train_notes.txt", "test_notes.txt"], "about\n"),
        (["requirements-train.txt", "requirements-dev.txt"], "numpy\n"),
        (["training.jsonl", "contest.jsonl", "devices.jsonl"], RECORDS),
        (["a-train.jsonl", "b-test.jsonl"], RECORDS),
        (["test.jsonl", "validation.jsonl"], RECORDS),
        (["train.jsonl", "train_2.jsonl"], RECORDS),
    ],
)
def test_splits_folder_of_other_files_is_read_whole(tmp_path: Path, names: list[str], content: str) -> None:
    write(tmp_path, *names, content=content)
    found = find_files(str(tmp_path))
    assert read_names(found, tmp_path) == sorted(names)
    assert found.passed_over == ()


def test_splits_of_dataset_dict_are_told_by_first_word(tmp_path: Path) -> None:
    splits = ["train_sft", "test_sft", "test_gen", "extra"]
    for split in splits:
        write(tmp_path / split, "a.parquet")
    write(tmp_path, "dataset_dict.json", content=json.dumps({"splits": splits}))
    found = find_files(str(tmp_path))
    assert read_names(found, tmp_path) == ["extra/a.parquet", "train_sft/a.parquet"]
    reason = "the test_sft split of a Hugging Face dataset; name it to read it"
    assert reason in [item.reason for item in found.passed_over]


def test_splits_that_are_read_are_named(tmp_path: Path) -> None:
    write(tmp_path, *(f"both/{name}" for name in ("test.jsonl", "validation-00000-of-00001.parquet")))
    write(tmp_path, "one/test.jsonl", "saved/test/a.parquet", "saved/dev/a.parquet", "sft/train_b.jsonl")
    write(
        tmp_path, "sft/train_a.jsonl", "sft/test.jsonl", "plain/train.jsonl", "code/test_a.py", "code/dev.py"
    )
    several = "it is read with the splits {}; to read only some, name their files"
    expected = {
        "both": [several.format("test, validation")],
        "one": ["its split test is read, which is usually held out"],
        "one/*.jsonl": [],
        "one/test.jsonl": [],
        "both/*": [several.format("test, validation")],
        "saved": [several.format("dev, test")],
        "saved/test": [],
        "sft": [several.format("train_a, train_b")],
        "sft/*.jsonl": [several.format("test, train_a, train_b")],
        "plain": [],
        "code": [],
    }
    for entry, notes in expected.items():
        found = find_files(str(tmp_path / entry))
        folder = tmp_path / entry.partition("/")[0]
        assert found.notes == tuple(f"{folder}: {note}" for note in notes)
    index = prepare(str(tmp_path / "both"), tmp_path / "out", ByteTokenizer(), val_fraction=0.0)
    assert index.text.warnings == (f"{tmp_path / 'both'}: {several.format('test, validation')}",)


# The cache of the Hub


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository of the Hub with two revisions, of which one file is the same."""
    repo = tmp_path / "datasets--someone--name"
    write(repo, "blobs/old", "blobs/new", "blobs/same")
    for number, (revision, blob) in enumerate({"bbb": "old", "aaa": "new"}.items()):
        (repo / "snapshots" / revision).mkdir(parents=True)
        for name, target in (("changed.jsonl", blob), ("same.jsonl", "same")):
            (repo / "snapshots" / revision / name).symlink_to(repo / "blobs" / target)
        os.utime(repo / "snapshots" / revision, (number, number))
    return repo


@pytest.mark.parametrize("entry", ["", "snapshots", "**/*.jsonl"])
def test_hub_revision_of_main_is_read(repo: Path, entry: str) -> None:
    write(repo, "refs/main", content="aaa\n")
    found = find_files(str(repo / entry))
    assert read_names(found, repo) == ["snapshots/aaa/changed.jsonl", "snapshots/aaa/same.jsonl"]
    if "*" not in entry:
        reason = "another revision than aaa, which refs/main names; name it to read it"
        assert {item.path.name: item.reason for item in found.passed_over}["bbb"] == reason
    assert len(find_files(str(repo / "snapshots/bbb")).files) == 2


@pytest.mark.parametrize("main", [None, "ccc", ""])
def test_hub_revisions_without_main_are_refused(repo: Path, main: str | None) -> None:
    if main is not None:
        write(repo, "refs/main", content=main)
    with pytest.raises(DataError, match="refs/main names none of them: aaa, bbb") as caught:
        find_files(str(repo))
    assert str(caught.value).endswith(f"such as the newest: {repo / 'snapshots/aaa'}")


def test_hub_only_revision_is_read_without_main(repo: Path) -> None:
    for name in ("changed.jsonl", "same.jsonl"):
        (repo / "snapshots/bbb" / name).unlink()
    (repo / "snapshots/bbb").rmdir()
    write(repo, "refs/main", content="ccc")
    assert len(find_files(str(repo)).files) == 2
