"""The documents of rows: best-fit packing and the contiguous cut, against brute-force references."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.token_folders import SEPARATOR, numbered, write_folder

from kempnerforge.data import packing as packing_module
from kempnerforge.data.fingerprint import explain_difference, fingerprint
from kempnerforge.data.packing import Packing, best_fit, cut_documents, pack_documents
from kempnerforge.data.packing_file import PackingFile
from kempnerforge.data.rows import IGNORED, Rows
from kempnerforge.data.tokens import RowOptions, TokenDataset, open_dataset
from kempnerforge.errors import DataError
from kempnerforge.train.mixture_run import samples_per_epoch

lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=60)
seq_lens = st.integers(1, 24)


def pieces_of(lengths: list[int], seq_len: int) -> list[range]:
    """The tokens of each piece, by the rule in the docstring of the module, one document after the other."""
    pieces = []
    begin = 0
    for length in lengths:
        for start in range(begin, begin + length - 1, seq_len):
            pieces.append(range(start, min(start + seq_len + 1, begin + length)))
        begin += length
    return pieces


def rows_of(packing: Packing) -> list[list[range]]:
    """The tokens of each piece of each row."""
    edges = packing.first_piece.tolist()
    pieces = [
        range(start, start + length)
        for start, length in zip(packing.starts.tolist(), packing.lengths.tolist(), strict=True)
    ]
    return [pieces[first:stop] for first, stop in itertools.pairwise(edges)]


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The free space of each row, by trying every row for every piece."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, space in enumerate(free) if space >= length]
        if fitting:
            free[min(fitting, key=lambda row: free[row])] -= length
        else:
            free.append(capacity - length)
    return free


@settings(deadline=None)
@given(lengths_of_documents, seq_lens)
def test_packing_every_piece_is_in_one_row(lengths: list[int], seq_len: int) -> None:
    packing = pack_documents(np.cumsum(lengths).astype(np.uint64), seq_len)
    rows = rows_of(packing)
    assert sorted((piece for row in rows for piece in row), key=lambda piece: piece.start) == pieces_of(
        lengths, seq_len
    )
    assert all(0 < sum(map(len, row)) <= seq_len + 1 for row in rows)
    assert all(row == sorted(row, key=lambda piece: piece.start) for row in rows)
    assert rows == sorted(rows, key=lambda row: row[0].start)
    assert packing.num_targets == sum(length - 1 for length in lengths)


@settings(deadline=None)
@given(lengths_of_documents, seq_lens)
def test_packing_document_that_fits_a_row_is_not_cut(lengths: list[int], seq_len: int) -> None:
    pieces = pieces_of(lengths, seq_len)
    whole = {piece.start: len(piece) for piece in pieces}
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    for start, length in zip(starts, lengths, strict=True):
        if 2 <= length <= seq_len + 1:
            assert whole[start] == length


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), max_size=80))
def test_best_fit_equals_trying_every_row(lengths: list[int]) -> None:
    row_of, num_rows = best_fit(np.array(lengths, dtype=np.uint32), 20)
    filled = np.bincount(row_of, weights=lengths, minlength=num_rows).astype(int)
    assert sorted(20 - filled) == sorted(best_fit_decreasing(lengths, 20))


def test_best_fit_capacity_above_16_bits() -> None:
    lengths = np.array([70_000, 50_000, 30_000, 50_000, 20_000], dtype=np.uint32)
    row_of, num_rows = best_fit(lengths, 100_000)
    assert num_rows == 3
    assert row_of[0] == row_of[2]
    assert row_of[1] == row_of[3]


def test_packing_blocks_of_documents_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = np.cumsum(np.random.default_rng(0).integers(1, 90, size=500)).astype(np.uint64)
    whole = cut_documents(ends, 16)
    monkeypatch.setattr(packing_module, "_BLOCK_DOCUMENTS", 7)
    for array, expected in zip(cut_documents(ends, 16), whole, strict=True):
        assert array.dtype == expected.dtype
        assert (array == expected).all()


def test_packing_without_targets_has_no_rows() -> None:
    assert pack_documents(np.array([1, 2, 2, 3], dtype=np.uint64), 8).num_rows == 0
    assert pack_documents(np.array([], dtype=np.uint64), 8).num_rows == 0


def opened(folder: Path, *, mask: bool = False, best_fit: bool = False, **options: bool) -> TokenDataset:
    packing = "best_fit" if best_fit else "contiguous"
    rows = RowOptions(document_mask=mask, packing=packing, cache_dir=folder.parent / "cache")
    return open_dataset(folder, rows=rows, **options)


def all_rows(dataset: TokenDataset, seq_len: int, split: str = "train") -> Rows:
    samples = dataset.split(split, seq_len)
    return samples.read(np.arange(samples.num_samples))


@settings(deadline=None, max_examples=20)
@given(lengths_of_documents.filter(lambda lengths: max(lengths) > 1), seq_lens, st.integers(1, 50))
def test_packed_rows_count_every_target_once(lengths: list[int], seq_len: int, shard_tokens: int) -> None:
    """Each token occurs once in the data, so the rows tell which document each of their tokens is of."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_folder(Path(folder, "data"), {"train": numbered(lengths)}, shard_tokens=shard_tokens)
        rows = all_rows(opened(data, mask=True, best_fit=True), seq_len)
        unmasked = all_rows(opened(data, best_fit=True), seq_len)
    document_of = np.append(np.repeat(np.arange(len(lengths)), lengths), np.full(SEPARATOR, -1))
    firsts = np.cumsum([0, *lengths[:-1]])
    assert rows.counted is not None
    assert rows.document_ids is not None
    assert (rows.document_ids.dtype, rows.counted.dtype) == (np.int32, np.bool_)
    targets = rows.tokens[:, 1:][rows.counted]
    assert sorted(targets) == sorted(set(range(sum(lengths))) - set(firsts.tolist()))
    assert (rows.tokens[:, :-1][rows.counted] == targets - 1).all()
    assert (rows.targets[~rows.counted] == IGNORED).all()
    for tokens, numbers in zip(rows.inputs, rows.document_ids, strict=True):
        is_padding = tokens == SEPARATOR
        assert not (is_padding[:-1] & ~is_padding[1:]).any()
        same = (np.diff(document_of[tokens]) == 0) & ((np.diff(tokens) == 1) | is_padding[1:])
        assert numbers[0] == 0
        assert (np.diff(numbers) == ~same).all()
    assert unmasked.document_ids is None
    assert (unmasked.tokens == rows.tokens).all()
    assert (unmasked.targets == rows.targets).all()


@pytest.mark.parametrize("best_fit", [False, True])
def test_samples_close_their_files_at_once(tmp_path: Path, best_fit: bool) -> None:
    """Also where no collection of cycles runs, as in training."""
    data = write_folder(tmp_path / "data", {"train": numbered([30, 40] * 10)}, shard_tokens=50)
    gc.disable()
    try:
        all_rows(opened(data, mask=True, best_fit=best_fit), 8)
        before = len(os.listdir("/proc/self/fd"))
        all_rows(opened(data, mask=True, best_fit=best_fit), 8)
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        gc.enable()


def test_rows_tell_whether_all_targets_count(tmp_path: Path) -> None:
    """Only then do the tokens of a run tell its epochs."""
    documents = {"train": numbered([30, 40])}
    plain = write_folder(tmp_path / "plain", documents)
    answers = write_folder(tmp_path / "answers", documents, counted={"train": np.ones(70, dtype=np.uint8)})
    found = {
        "plain": opened(plain),
        "mask": opened(plain, mask=True),
        "packed": opened(plain, best_fit=True),
        "answers": opened(answers),
    }
    epochs = {name: samples_per_epoch(data.split("train", 8)) for name, data in found.items()}
    assert epochs == {"plain": 8, "mask": None, "packed": None, "answers": None}


@settings(deadline=None, max_examples=20)
@given(lengths_of_documents, seq_lens, st.integers(1, 50), st.booleans())
def test_contiguous_mask_equals_reference(
    lengths: list[int], seq_len: int, shard_tokens: int, has_ends: bool
) -> None:
    if sum(lengths) <= seq_len:
        lengths = [*lengths, seq_len]
    documents = numbered(lengths)
    if not has_ends:  # only the separators tell where documents end
        documents = [np.append(document[:-1], SEPARATOR) for document in documents]
    with tempfile.TemporaryDirectory() as folder:
        data = write_folder(
            Path(folder, "data"), {"train": documents}, shard_tokens=shard_tokens, has_ends=has_ends
        )
        rows = all_rows(opened(data, mask=True), seq_len)
        plain = all_rows(opened(data), seq_len)
    assert (plain.counted, plain.document_ids) == (None, None)
    assert (plain.tokens == rows.tokens).all()
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    assert rows.counted is not None
    assert rows.document_ids is not None
    for row in range(len(rows.tokens)):
        own = document_of[row * seq_len : (row + 1) * seq_len + 1]
        assert rows.document_ids[row].tolist() == (own[:-1] - own[0]).tolist()
        assert rows.counted[row].tolist() == (own[1:] == own[:-1]).tolist()


@pytest.mark.parametrize("best_fit", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_rows_uncounted_tokens_are_no_targets(tmp_path: Path, best_fit: bool, mask: bool) -> None:
    lengths = np.random.default_rng(0).integers(2, 30, size=40).tolist()
    counts = np.random.default_rng(1).integers(2, size=sum(lengths)).astype(bool)
    data = write_folder(
        tmp_path / "data", {"train": numbered(lengths)}, counted={"train": counts}, shard_tokens=23
    )
    rows = all_rows(opened(data, mask=mask, best_fit=best_fit), 16)
    assert rows.counted is not None
    firsts = set(np.cumsum([0, *lengths[:-1]]).tolist()) if mask or best_fit else {0}
    stop = sum(lengths) if best_fit else len(rows.tokens) * 16 + 1
    expected = sorted(set(np.flatnonzero(counts[:stop]).tolist()) - firsts)
    assert sorted(rows.tokens[:, 1:][rows.counted].tolist()) == expected
    assert (rows.document_ids is not None) == mask


def test_packing_separators_of_format_1_end_documents(tmp_path: Path) -> None:
    documents = [np.append(document, SEPARATOR) for document in numbered([5, 3, 9, 2, 30, 1])]
    old = write_folder(tmp_path / "old", {"train": documents}, shard_tokens=11, has_ends=False)
    new = write_folder(tmp_path / "new", {"train": documents}, shard_tokens=11)
    for data in (old, new):
        rows = all_rows(opened(data, mask=True, best_fit=True), 8)
        assert rows.tokens.tolist() == all_rows(opened(old, best_fit=True), 8).tokens.tolist()


def test_packing_cuts_only_long_documents(tmp_path: Path) -> None:
    """As large a share of the targets counts as in contiguous rows, most of which begin within a document."""
    lengths = np.random.default_rng(3).geometric(1 / 60, size=800) + 1
    data = write_folder(tmp_path / "data", {"train": numbered(lengths.tolist())})
    is_long = np.repeat(lengths, lengths) > 129
    firsts = np.cumsum([0, *lengths[:-1]])
    num_cut, shares = [], []
    for fit in (False, True):
        rows = all_rows(opened(data, mask=True, best_fit=fit), 128)
        assert rows.counted is not None
        shares.append(rows.counted.mean())
        begin = np.setdiff1d(rows.tokens[:, 0], firsts)
        num_cut.append(int((~is_long[begin]).sum()))
    assert num_cut[0] > 200
    assert num_cut[1] == 0
    assert shares[1] > 0.97
    assert abs(shares[0] - shares[1]) < 0.02


def test_packing_log_says_how_full_rows_are(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", {"train": numbered([9, 5, 5, 4])})
    samples = opened(data, best_fit=True).split("train", 8)
    assert samples.describe() == "3 samples of 8 tokens, 1.3 documents in each, 79.17% filled"
    assert opened(data).split("train", 8).describe() == "2 samples of 8 tokens"
    assert samples.read(np.array([], dtype=np.int64)).tokens.shape == (0, 9)
    with pytest.raises(IndexError):
        samples.read(np.array([3]))


@pytest.mark.parametrize(("mask", "best_fit"), [(True, False), (False, True)])
def test_documents_of_npy_shards_refused(tmp_path: Path, mask: bool, best_fit: bool) -> None:
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "a.npy", np.arange(100))
    dataset = opened(tmp_path / "data", mask=mask, best_fit=best_fit)
    key = r'data\.packing = "best_fit"' if best_fit else r"data\.document_mask = true"
    for use in (dataset.split, dataset.check_split):
        with pytest.raises(DataError, match=rf"do not record where documents end, which {key} needs"):
            use("train", 8)


def test_packing_of_documents_of_one_token_refused(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", {"train": numbered([1, 1, 1])})
    with pytest.raises(DataError, match="no document of the train split has two tokens"):
        opened(data, best_fit=True).split("train", 2)


# The stored packing.


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lengths = np.random.default_rng(0).integers(1, 30, size=100).tolist()
    return write_folder(tmp_path / "data", {"train": numbered(lengths), "val": numbered(lengths[:9])})


def stored(data: Path) -> list[Path]:
    return sorted((data.parent / "cache").iterdir())


def test_packing_stored_once_for_each_key(data: Path) -> None:
    first = all_rows(opened(data, best_fit=True), 16)
    (path,) = stored(data)
    before = path.stat()
    again = opened(data, best_fit=True, mask=True)
    assert (all_rows(again, 16).tokens == first.tokens).all()
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    again.split("val", 16)
    again.split("train", 15)
    assert len(stored(data)) == 3


@pytest.mark.parametrize("harm", ["flipped", "cut short", "empty", "not a packing", "too long"])
def test_packing_damaged_file_made_again(data: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = all_rows(opened(data, best_fit=True), 16)
    (path,) = stored(data)
    sound = path.read_bytes()
    flipped = bytearray(sound)
    flipped[-3] ^= 1
    contents = {
        "flipped": bytes(flipped),
        "cut short": sound[:-4],
        "empty": b"",
        "not a packing": b"x" * len(sound),
        "too long": sound + b"\0",
    }
    path.write_bytes(contents[harm])
    with caplog.at_level(logging.WARNING):
        assert (all_rows(opened(data, best_fit=True), 16).tokens == rows.tokens).all()
    assert f"{path}: " in caplog.text
    assert "it is made again" in caplog.text
    assert path.read_bytes() == sound


def test_packing_another_rank_only_opens_it(data: Path) -> None:
    waiting = opened(data, best_fit=True, verify=False)
    with pytest.raises(DataError, match=r"no such file here.*set data\.cache_dir to a folder that all nodes"):
        waiting.split("train", 16)
    made = all_rows(opened(data, best_fit=True), 16)
    assert (all_rows(waiting, 16).tokens == made.tokens).all()
    os.truncate(stored(data)[0], 300)
    with pytest.raises(DataError, match="damaged"):
        waiting.split("train", 16)


def test_packing_cache_that_cannot_be_written_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot write the packing .*set data\.cache_dir to a writable"):
        opened(data, best_fit=True).split("train", 16)


def test_packing_leftovers_of_killed_process_removed(data: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    file = PackingFile.of(tmp_path / "cache", dataset="d", ends=[None], split="train", seq_len=4)
    old, new = (file.path.with_name(f".{file.path.name}.1.{name}.tmp") for name in ("old", "new"))
    for leftover in (old, new):
        leftover.touch()
    os.utime(old, (1, 1))
    file.open_or_make(lambda: np.array([5], dtype=np.uint64), 4)
    assert sorted(stored(data)) == sorted([new, file.path])


def test_packing_belongs_to_fingerprint(data: Path) -> None:
    plain = fingerprint(opened(data), "train", 16, seed=1)
    assert fingerprint(opened(data, mask=True), "train", 16, seed=1) == plain
    assert set(plain) == {"dataset", "vocab_size", "split", "num_samples", "seq_len", "seed", "order"}
    packed = fingerprint(opened(data, best_fit=True), "train", 16, seed=1)
    assert packed["packing"] == "best_fit (best-fit-decreasing-1)"
    lines = explain_difference(plain, packed)
    assert "data.packing: was 'contiguous', is 'best_fit (best-fit-decreasing-1)'" in lines
    assert "data.packing: was 'best_fit (best-fit-decreasing-1)', is 'contiguous'" in explain_difference(
        packed, plain
    )
    assert any(line.startswith("where documents end (digest): was not recorded") for line in lines)


@pytest.mark.parametrize("suffix", ["ends", "counted"])
def test_dataset_damaged_file_of_documents_found(tmp_path: Path, suffix: str) -> None:
    lengths = [7, 20, 9, 4]
    data = write_folder(
        tmp_path / "data",
        {"train": numbered(lengths)},
        counted={"train": np.ones(sum(lengths))},
        shard_tokens=15,
    )
    opened(data)
    path = data / f"train_00001.{suffix}"
    sound = path.read_bytes()
    path.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
    with pytest.raises(DataError, match=rf"train_00001\.{suffix}: damaged, its digest"):
        opened(data)
    path.write_bytes(sound[:-1])
    with pytest.raises(DataError, match=rf"train_00001\.{suffix}: cut short"):
        opened(data, verify=False)
    path.unlink()
    with pytest.raises(DataError, match=rf"train_00001\.{suffix}: No such file"):
        opened(data, verify=False)


def test_fingerprint_of_documents_does_not_depend_on_shards(tmp_path: Path) -> None:
    def of(name: str, lengths: list[int], shard_tokens: int) -> str:
        data = write_folder(tmp_path / name, {"train": numbered(lengths)}, shard_tokens=shard_tokens)
        return fingerprint(opened(data, best_fit=True), "train", 8, seed=1)["documents"]

    digests = [of("a", [9, 5, 5, 4], 1000), of("b", [9, 5, 5, 4], 6), of("c", [9, 4, 6, 4], 1000)]
    assert digests[0] == digests[1] != digests[2]


def test_rows_damaged_ends_that_were_not_verified_named(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", {"train": numbered([7, 20, 9, 4])})
    sound = np.fromfile(data / "train_00000.ends", dtype="<u8")
    for place, value in ((3, 1 << 40), (1, 1 << 40), (1, 3)):
        damaged = sound.copy()
        damaged[place] = value
        damaged.tofile(data / "train_00000.ends")
        packed = opened(data, best_fit=True, verify=False)
        packed.makes_packing = True
        with pytest.raises(DataError, match=r"train_00000\.ends: damaged\. See: kempnerforge data inspect"):
            packed.split("train", 8)
    np.array([1, 1 << 40, 36, 40], dtype="<u8").tofile(data / "train_00000.ends")
    with pytest.raises(DataError, match=r"train_00000\.ends: damaged"):
        all_rows(opened(data, mask=True, verify=False), 39)
