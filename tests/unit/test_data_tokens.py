"""Opening token shards: what is read from them, and everything that can be wrong with them."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from kempnerforge.data import samples as samples_module
from kempnerforge.data import tokens as tokens_module
from kempnerforge.data.fingerprint import explain_difference, fingerprint
from kempnerforge.data.prepare import prepare
from kempnerforge.data.tokenizer import ByteTokenizer
from kempnerforge.data.tokens import open_dataset
from kempnerforge.errors import DataError


@pytest.fixture
def prepared(tmp_path) -> Path:
    """About 20,000 byte tokens in shards of 1,000."""
    for number in range(100):
        (tmp_path / f"{number:03d}.txt").write_text(f"document {number} " * 13)
    out = tmp_path / "prepared"
    prepare([str(tmp_path / "*.txt")], out, ByteTokenizer(), val_fraction=0.1, shard_tokens=1000)
    return out


def save_npy(folder: Path, name: str, ids: np.ndarray) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    np.save(folder / name, ids)
    return ids


def damage(path: Path, offset: int) -> None:
    """Flip the lowest bit of one byte."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("seq_len", [1, 7, 64, 999, 2500])
def test_samples_match_stream_across_shards(prepared, seq_len):
    stream = np.concatenate([np.fromfile(file, dtype="<u2") for file in sorted(prepared.glob("train_*.bin"))])
    samples = open_dataset(prepared, vocab_size=300).split("train", seq_len)
    assert samples.num_samples == (stream.size - 1) // seq_len
    ids = np.random.default_rng(0).permutation(samples.num_samples)[:500]
    rows = samples.read(ids).tokens
    assert rows.dtype == np.int64
    assert rows.shape == (ids.size, seq_len + 1)
    expected = np.stack([stream[i * seq_len : i * seq_len + seq_len + 1] for i in ids])
    assert (rows == expected).all()


def test_samples_unknown_id_refused(prepared):
    samples = open_dataset(prepared).split("val", 16)
    for bad in (-1, samples.num_samples):
        with pytest.raises(IndexError):
            samples.read(np.array([0, bad]))
    assert samples.read(np.array([], dtype=np.int64)).tokens.shape == (0, 17)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64", ">i4"])
def test_dataset_npy_shards_read(tmp_path, dtype):
    parts = [
        save_npy(tmp_path / "d", f"train_{n}.npy", np.arange(50 * n, 50 * n + 50, dtype=dtype))
        for n in range(4)
    ]
    held_out = save_npy(tmp_path / "d", "val_0.npy", np.arange(33, dtype=dtype))
    dataset = open_dataset(tmp_path / "d", vocab_size=200)
    train, val = dataset.split("train", 10), dataset.split("val", 10)
    assert (train.num_samples, val.num_samples) == (19, 3)
    assert train.read(np.array([4])).tokens.tolist() == [np.concatenate(parts)[40:51].tolist()]
    assert val.read(np.array([2])).tokens.tolist() == [held_out[20:31].tolist()]
    assert dataset.vocab_size is None


def test_dataset_npy_without_val_shard_holds_out_end(tmp_path):
    save_npy(tmp_path / "d", "interval_evaluate.npy", np.arange(1001))
    dataset = open_dataset(tmp_path / "d", val_fraction=0.1)
    train, val = dataset.split("train", 10), dataset.split("val", 10)
    assert (train.num_samples, val.num_samples) == (90, 10)
    assert train.read(np.array([89])).tokens[0, -1] == 900
    assert val.read(np.array([0, 9])).tokens[:, 0].tolist() == [900, 990]
    whole = open_dataset(tmp_path / "d" / "interval_evaluate.npy", val_fraction=0.0)
    assert whole.split("train", 10).num_samples == 100
    with pytest.raises(DataError, match="no val split"):
        whole.split("val", 10)


@pytest.mark.parametrize(
    "name", ["val_0.npy", "shard-VAL.npy", "fineweb_validation_01.npy", "valid1.npy", "eval.npy"]
)
def test_dataset_val_shard_names_recognized(tmp_path, name):
    save_npy(tmp_path / "d", "a.npy", np.arange(100))
    save_npy(tmp_path / "d", name, np.arange(1000, 1050))
    assert open_dataset(tmp_path / "d").split("val", 8).read(np.array([0])).tokens[0, 0] == 1000


def test_dataset_more_shards_than_descriptors_read(tmp_path, monkeypatch):
    for number in range(80):
        save_npy(tmp_path / "d", f"{number:03d}.npy", np.full(10, number))
    monkeypatch.setattr(samples_module, "MAX_OPEN_FILES", 8)
    dataset = open_dataset(tmp_path / "d", val_fraction=0.0)
    samples = dataset.split("train", 10)
    used = len(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, limits[1]))
    try:
        rows = samples.read(np.arange(79)).tokens
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert rows[:, 0].tolist() == list(range(79))


# What can be wrong with a prepared folder: what is done to it, and what the message must say.


def cut_short(folder: Path) -> None:
    os.truncate(folder / "train_00003.bin", 1990)


def made_longer(folder: Path) -> None:
    with (folder / "train_00003.bin").open("ab") as file:
        file.write(b"\0\0")


def emptied(folder: Path) -> None:
    os.truncate(folder / "val_00000.bin", 0)


def removed(folder: Path) -> None:
    (folder / "train_00002.bin").unlink()


def flipped(folder: Path) -> None:
    damage(folder / "train_00004.bin", 777)


def swapped(folder: Path) -> None:
    first, second, aside = (folder / name for name in ("train_00000.bin", "train_00001.bin", "aside"))
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def index_cut_short(folder: Path) -> None:
    os.truncate(folder / "index.json", 300)


def edit_index(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut_short, r"train_00003\.bin: cut short, 1,990 of 2,000 bytes.*data inspect"),
        (made_longer, r"train_00003\.bin: too long, 2,002 bytes instead of 2,000"),
        (emptied, r"val_00000\.bin: cut short, 0 of"),
        (removed, r"train_00002\.bin: No such file"),
        (flipped, r"train_00004\.bin: damaged, its digest"),
        (swapped, r"train_00000\.bin: damaged, its digest.*and 1 more"),
        (index_cut_short, r"index\.json: damaged, not JSON"),
        (
            lambda folder: edit_index(folder, format=9),
            r"index\.json: format 9; this version reads formats 1 and 2",
        ),
        (lambda folder: edit_index(folder, dtype="float32"), r"index\.json: damaged.*float32"),
        (lambda folder: edit_index(folder, vocab_size=70), r"index\.json: damaged.*vocabulary 70"),
        (lambda folder: edit_index(folder, separator_id=3), r"index\.json: damaged or edited"),
        (lambda folder: edit_index(folder, splits={}), r"index\.json: damaged or edited"),
        (lambda folder: edit_index(folder, splits=[]), r"index\.json: damaged"),
        (lambda folder: (folder / "index.json").unlink(), r"neither index\.json nor \.npy files"),
        (shutil.rmtree, r"no such file or folder\. Create it: kempnerforge data prepare"),
    ],
)
def test_dataset_damaged_folder_found_on_open(prepared, harm, message):
    open_dataset(prepared, vocab_size=257)
    harm(prepared)
    with pytest.raises(DataError, match=f"(?s){message}"):
        open_dataset(prepared, vocab_size=257)


def test_dataset_shard_outside_folder_refused(prepared):
    content = json.loads((prepared / "index.json").read_text())
    content["splits"]["train"]["shards"][0]["file"] = "../secret.bin"
    (prepared / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="not a plain file name"):
        open_dataset(prepared)


def test_dataset_any_flipped_byte_found(prepared):
    rng = np.random.default_rng(1)
    for file in rng.choice(sorted(prepared.glob("*.bin")), 12):
        offset = int(rng.integers(Path(file).stat().st_size))
        damage(file, offset)
        with pytest.raises(DataError, match=Path(file).name):
            open_dataset(prepared)
        damage(file, offset)
    open_dataset(prepared)


def test_dataset_unverified_checks_sizes_and_ids_read(prepared):
    damage(prepared / "train_00000.bin", 1)  # the high byte: an id of 256 more
    dataset = open_dataset(prepared, verify=False)
    with pytest.raises(DataError, match=r"token id 3\d\d, but the vocabulary has 257"):
        dataset.split("train", 8).read(np.array([0]))
    cut_short(prepared)
    with pytest.raises(DataError, match="cut short"):
        open_dataset(prepared, verify=False)


def test_dataset_vocabulary_too_small_refused(prepared, tmp_path):
    with pytest.raises(DataError, match=r"bytes has 257 ids, but model\.vocab_size = 256"):
        open_dataset(prepared, vocab_size=256)
    open_dataset(prepared, vocab_size=50_000)
    save_npy(tmp_path / "d", "a.npy", np.arange(1000))
    with pytest.raises(DataError, match=r"a\.npy: holds token id 999, but the vocabulary has 999 ids"):
        open_dataset(tmp_path / "d", vocab_size=999)
    open_dataset(tmp_path / "d", vocab_size=1000)


def bad_npy(folder: Path, kind: str) -> None:
    save_npy(folder, "0.npy", np.arange(100))
    path = folder / "1.npy"
    match kind:
        case "cut short":
            np.save(path, np.arange(1000))
            os.truncate(path, 4000)
        case "no bytes":
            path.touch()
        case "no tokens":
            np.save(path, np.arange(0))
        case "too long":
            np.save(path, np.arange(10))
            path.write_bytes(path.read_bytes() + b"tail")
        case "floats":
            np.save(path, np.ones(10, dtype=np.float32))
        case "two dimensions":
            np.save(path, np.ones((10, 2), dtype=np.int64))
        case "negative":
            np.save(path, np.array([5, -3, 2]))
        case "pickle":
            np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        case "text":
            path.write_text("not an array")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut short", "cut short"),
        ("no bytes", "cut short, or not"),
        ("no tokens", "holds no tokens"),
        ("too long", "too long"),
        ("floats", "dtype float32; token ids are uint16"),
        ("two dimensions", r"one-dimensional.*\(10, 2\)"),
        ("negative", "negative token id -3"),
        ("pickle", r"not a \.npy array"),
        ("text", r"not a \.npy array"),
    ],
)
def test_dataset_bad_npy_shard_found_on_open(tmp_path, kind, message):
    bad_npy(tmp_path / "d", kind)
    with pytest.raises(DataError, match=rf"1\.npy.*{message}"):
        open_dataset(tmp_path / "d", vocab_size=1000)


def test_dataset_without_train_shards_refused(tmp_path):
    save_npy(tmp_path / "d", "val_0.npy", np.arange(10))
    save_npy(tmp_path / "d", "val_1.npy", np.arange(10))
    with pytest.raises(DataError, match="none is for training"):
        open_dataset(tmp_path / "d")
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(DataError, match=r"must be \.npy. For text: kempnerforge data prepare"):
        open_dataset(tmp_path / "notes.txt")


def test_dataset_too_few_tokens_refused(prepared, tmp_path):
    dataset = open_dataset(prepared)
    with pytest.raises(DataError, match=r"too few tokens for one train sample.*seq_len = 90000 needs 90,001"):
        dataset.split("train", 90_000)
    save_npy(tmp_path / "d", "a.npy", np.arange(17))
    dataset = open_dataset(tmp_path / "d", val_fraction=0.01)
    assert dataset.split("train", 8).num_samples == dataset.split("val", 8).num_samples == 1
    with pytest.raises(DataError, match="too few tokens for one train sample"):
        dataset.split("train", 16)


def test_fingerprint_differences_explained(prepared, tmp_path):
    dataset = open_dataset(prepared)
    stored = json.loads(json.dumps(fingerprint(dataset, "train", 16, seed=1)))
    assert explain_difference(stored, fingerprint(open_dataset(prepared), "train", 16, seed=1)) == []
    lines = explain_difference(stored, fingerprint(dataset, "train", 32, seed=2))
    assert "train.seq_len: was 16, is 32" in lines
    assert "the seed of the data order: was 1, is 2" in lines
    assert len(lines) == 3  # and the samples per epoch
    assert explain_difference({}, {"seed": 1}) == ["the seed of the data order: was not recorded, is 1"]
    assert explain_difference({"new": 1}, {}) == ["new: was 1, is not recorded"]

    moved = tmp_path / "moved"
    shutil.copytree(prepared, moved)
    assert fingerprint(open_dataset(moved), "train", 16, seed=1) == stored


@pytest.mark.parametrize("verify_bytes", [4 << 30, 1000])
def test_dataset_npy_digest_depends_on_content(tmp_path, monkeypatch, verify_bytes):
    monkeypatch.setattr(tokens_module, "VERIFY_BYTES", verify_bytes)
    ids = save_npy(tmp_path / "a", "x.npy", np.arange(5000))
    save_npy(tmp_path / "b", "y.npy", ids)
    save_npy(tmp_path / "c", "x.npy", ids[::-1])
    digests = [open_dataset(tmp_path / name).digest for name in "abc"]
    assert digests[0] == digests[1] != digests[2]
    assert open_dataset(tmp_path / "a", val_fraction=0.2).digest != digests[0]
