"""Every byte checked, and what differs between steps in any layout."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.step_maker import arrays, flip_byte, resign, write_step

from kempnerforge.checkpoint.format import checksums, manifest, safetensors_file
from kempnerforge.checkpoint.format.step_info import StepView
from kempnerforge.checkpoint.format.tensor_index import Chunk, TensorEntry
from kempnerforge.checkpoint.tools import diff, verify
from kempnerforge.checkpoint.tools.diff import changes, compare_tensors, content_of
from kempnerforge.errors import (
    DamagedCheckpointError,
    MismatchError,
    StepNotFoundError,
    UnreachableCheckpointError,
)

SHARD = "shard_00000_of_00001.safetensors"
HALVES = {
    "model.w": [((0, 0), (4, 4)), ((4, 0), (2, 4))],
    "optimizer.state.w.exp_avg": [((0, 0), (6, 1)), ((0, 1), (6, 3))],
}
"""One tensor split over rows, one over columns."""


def problems(path: Path) -> list[str]:
    return list(verify.verify(path, threads=2).problems)


# Sound


@pytest.mark.parametrize("boxes", [None, HALVES])
def test_verify_sound_step_left_unchanged(tmp_path: Path, boxes: dict | None) -> None:
    path = write_step(tmp_path, 5, boxes=boxes)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    reported: list[tuple[int, int]] = []
    found = verify.verify(path, progress=lambda done, total: reported.append((done, total)))
    assert found.sound
    assert (found.problems, found.foreign) == ((), ())
    assert reported[-1] == (found.size_bytes, found.size_bytes)
    assert [done for done, _ in reported] == sorted(done for done, _ in reported)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert os.listdir(tmp_path) == [path.name]


def test_verify_renamed_step_without_config_sound(tmp_path: Path) -> None:
    path = write_step(tmp_path, 5, config=None).rename(tmp_path / "my_model")
    assert verify.verify(path).sound


def test_verify_empty_tensor_and_empty_step_sound(tmp_path: Path) -> None:
    assert verify.verify(write_step(tmp_path, 1, state={"a": np.empty((0, 4), np.float32)})).sound
    assert verify.verify(write_step(tmp_path, 2, state={})).sound


def test_verify_foreign_file_reported_step_sound(tmp_path: Path) -> None:
    path = write_step(tmp_path, 5)
    (path / "notes.txt").write_text("mine")
    found = verify.verify(path)
    assert found.sound
    assert found.foreign == ("notes.txt",)


# Damaged


def swap(path: Path, one: str, other: str) -> None:
    (path / one).rename(path / "x")
    (path / other).rename(path / one)
    (path / "x").rename(path / other)


ONE_FAULT: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: flip_byte(path / SHARD, -1), f"{SHARD} has a wrong digest in bytes 0 to"),
    (lambda path: flip_byte(path / SHARD, 20), f"{SHARD} has a wrong digest in bytes 0 to"),
    (lambda path: flip_byte(path / "index.bin", 30), "index.bin has a wrong digest"),
    (lambda path: flip_byte(path / "config.toml", 3), "config.toml has a wrong digest"),
    (lambda path: flip_byte(path / "train_state.json", 3), "train_state.json has a wrong digest"),
    (lambda path: flip_byte(path / "manifest.json", 60), "manifest.json"),
    (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda path: (path / SHARD).unlink(), f"{SHARD} is missing"),
    (lambda path: os.truncate(path / SHARD, 50), f"{SHARD} has 50 of"),
    (lambda path: resign(path, step=6), "its manifest is of step 6"),
    (lambda path: shutil.copy(path / SHARD, path / "a.safetensors"), "a.safetensors is not in the manifest"),
]


@pytest.mark.parametrize(("damage", "problem"), ONE_FAULT)
def test_verify_damage_named(tmp_path: Path, damage: Callable[[Path], object], problem: str) -> None:
    path = write_step(tmp_path, 5)
    damage(path)
    (found,) = problems(path)
    assert problem in found
    assert "step_00000005" not in found


def test_verify_many_faults_reported_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (checksums, manifest, verify):
        monkeypatch.setattr(module, "BLOCK_BYTES", 1024)
    path = write_step(tmp_path, 5, state={"model.w": np.arange(5000, dtype=np.float32)})
    assert verify.verify(path, threads=3).sound
    for position in (4096 + 10, 4096 + 1030, 4096 + 15 * 1024):
        flip_byte(path / SHARD, position)
    flip_byte(path / "config.toml", 3)
    found = problems(path)
    assert [problem.partition(", on")[0] for problem in found] == [
        "config.toml has a wrong digest in bytes 0 to 47",
        f"{SHARD} has a wrong digest in bytes 4096 to 5120",
        f"{SHARD} has a wrong digest in bytes 5120 to 6144",
        f"{SHARD} has a wrong digest in bytes 19456 to 20480",
    ]


def replaced_in_header(path: Path, before: bytes, now: bytes) -> None:
    data = path.read_bytes()
    assert before in data
    assert len(before) == len(now)
    path.write_bytes(data.replace(before, now, 1))


def without_padding(path: Path) -> None:
    """The same tensors under a header of another length: they all move."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip(b" ")
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


SIGNED: list[tuple[Callable[[Path], object], str]] = [
    # Digests are right, and the parts do not fit together: a fault of a writer, or somebody's work.
    (lambda path: replaced_in_header(path / SHARD, b'"model.b":{"d', b'"model.c":{"d'), "model.c"),
    (
        lambda path: replaced_in_header(path / SHARD, b'"shape":[6,4]', b'"shape":[4,6]'),
        "disagree on model.w",
    ),
    (lambda path: replaced_in_header(path / SHARD, b'"F32"', b'"I32"'), "disagree on model.b"),
    (lambda path: replaced_in_header(path / SHARD, b'"F32"', b'"F64"'), "is F64 of shape (5,) in 20 bytes"),
    (lambda path: replaced_in_header(path / SHARD, b'"F32"', b'"X32"'), "has dtype 'X32'"),
    (lambda path: replaced_in_header(path / SHARD, b"[0,20]", b"[4,24]"), "begins at byte 4100"),
    (lambda path: replaced_in_header(path / SHARD, b"[0, 0]", b"[1, 0]"), "disagree on model.w"),
    (lambda path: replaced_in_header(path / SHARD, b"__metadata__", b"__metadatA__"), "header lacks"),
    (lambda path: replaced_in_header(path / SHARD, b'{"', b"[["), "header cannot be parsed"),
    (lambda path: (path / SHARD).write_bytes(b"123"), "too short to have a header"),
    (lambda path: (path / SHARD).write_bytes(b"\xff" * 100), "header would have 18446744073709551615"),
    (lambda path: (path / SHARD).write_bytes((path / SHARD).read_bytes() + b"x"), "tensors end at byte"),
    (lambda path: without_padding(path / SHARD), "disagree on model.b"),
    (lambda path: (path / "train_state.json").write_text("[]"), "train_state.json is not a JSON object"),
    (lambda path: (path / "train_state.json").write_text("{"), "train_state.json cannot be parsed"),
    (
        lambda path: (path / "train_state.json").write_text('{"step": 6}'),
        "it holds step 6, but the manifest says step 5",
    ),
    (lambda path: (path / "train_state.json").write_text('{"a": {"__x__": 1}}'), "unknown tag '__x__'"),
    (lambda path: (path / "config.toml").write_text("= 3"), "config.toml cannot be parsed"),
    (lambda path: (path / "config.toml").write_bytes(b"\xff"), "config.toml cannot be parsed"),
    (lambda path: (path / "index.bin").write_bytes(b"KFINDEX1" + bytes(24)), "index.bin"),
    (lambda path: flip_byte(path / "index.bin", -8), "which is not a shard in the manifest"),
]


@pytest.mark.parametrize(("change", "problem"), SIGNED)
def test_verify_inconsistent_parts_valid_digests_found(
    tmp_path: Path, change: Callable[[Path], object], problem: str
) -> None:
    path = write_step(tmp_path, 5)
    change(path)
    resign(path)
    manifest.load(path, step=5)
    found = problems(path)
    assert any(problem in one for one in found), found


def test_verify_duplicate_name_in_header_found(tmp_path: Path) -> None:
    path = write_step(tmp_path, 5)
    replaced_in_header(path / SHARD, b'"model.w":{', b'"model.b":{')
    resign(path)
    assert any("a name occurs twice" in one for one in problems(path))


def test_verify_swapped_shards_found(tmp_path: Path) -> None:
    path = write_step(tmp_path, 5, boxes=HALVES)
    swap(path, "shard_00000_of_00002.safetensors", "shard_00001_of_00002.safetensors")
    assert problems(path)
    resign(path)
    assert any("disagree on model.w" in one for one in problems(path))


def test_verify_shard_link_out_of_folder_is_damage(tmp_path: Path) -> None:
    path = write_step(tmp_path, 5)
    elsewhere = (path / SHARD).rename(tmp_path / "elsewhere")
    (path / SHARD).symlink_to(elsewhere)
    body = json.loads((path / "manifest.json").read_text())
    body["files"][SHARD]["size_bytes"] = (path / SHARD).lstat().st_size
    resign(path, files=body["files"])
    assert problems(path) == [f"{SHARD} is not a regular file"]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_shard_header_any_bytes_no_other_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any bytes in a header give an answer or ValueError."""
    path = write_step(tmp_path_factory.mktemp("steps"), 5) / SHARD
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 700))] = data.draw(st.sampled_from(b'0123456789[]{}",:-e. \x00\xff'))
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        safetensors_file.read_header(path)


# Neither sound nor damaged


def test_verify_newer_format_is_mismatch(tmp_path: Path) -> None:
    path = write_step(tmp_path, 5)
    resign(path, format=2)
    with pytest.raises(MismatchError, match="format 2"):
        verify.verify(path)


def test_verify_storage_error_step_may_be_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checksums.fsio, "read_range", fail)
    with pytest.raises(UnreachableCheckpointError, match=r"Input/output error. It may be intact"):
        verify.verify(write_step(tmp_path, 5))


def test_verify_step_vanishes_is_not_damage(tmp_path: Path) -> None:
    path = write_step(tmp_path, 5)

    def vanish(_done: int, _total: int) -> None:
        path.rename(tmp_path / "gone")

    with pytest.raises(StepNotFoundError):
        verify.verify(path, threads=1, progress=vanish)
    with pytest.raises(StepNotFoundError):
        verify.verify(path)


# What differs


def views(tmp_path: Path, **others: Any) -> tuple[StepView, StepView]:
    one = write_step(tmp_path / "a", 5)
    other = write_step(tmp_path / "b", 5, **others)
    return StepView.open(one), StepView.open(other)


def test_compare_same_state_in_two_layouts_equal(tmp_path: Path) -> None:
    a, b = views(tmp_path, boxes=HALVES)
    found = compare_tensors(a, b)
    assert not found.any
    assert found.equal == 5


def test_compare_differing_tensors_named_by_kind(tmp_path: Path) -> None:
    state = arrays(5)
    del state["rng.rank_00000"]
    state["rng.rank_00001"] = np.zeros(40, np.uint8)
    state["model.b"] = state["model.b"].astype(np.float64)
    state["optimizer.state.w.exp_avg"] = state["optimizer.state.w.exp_avg"].copy()
    state["optimizer.state.w.exp_avg"][5, 3] += 1
    a, b = views(tmp_path, state=state, boxes=HALVES)
    reported: list[tuple[int, int]] = []
    found = compare_tensors(a, b, progress=lambda done, total: reported.append((done, total)))
    assert found.only_a == ("rng.rank_00000",)
    assert found.only_b == ("rng.rank_00001",)
    assert found.shape_or_dtype == {"model.b": ("F32 [5]", "F64 [5]")}
    assert found.content == ("optimizer.state.w.exp_avg",)
    assert found.equal == 2
    assert reported[-1] == (2 * (96 + 96 + 4),) * 2
    unread = compare_tensors(a, b, content=False)
    assert unread.content is None
    assert unread.equal == 3


def test_compare_damaged_byte_names_its_tensor(tmp_path: Path) -> None:
    a, b = views(tmp_path)
    flip_byte(b.path / SHARD, -1)  # bytes are last: the smallest elements
    assert compare_tensors(a, b).content == ("rng.rank_00000",)


def test_compare_index_of_other_files_refused(tmp_path: Path) -> None:
    a, b = views(tmp_path)
    data = (b.path / "index.bin").read_bytes().replace(SHARD.encode(), b"../../" + b"a" * (len(SHARD) - 6))
    (b.path / "index.bin").write_bytes(data)
    resign(b.path)
    with pytest.raises(DamagedCheckpointError, match="which is not in the manifest"):
        compare_tensors(a, StepView.open(b.path))


boxes_1d = st.lists(st.integers(1, 3), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(splits=st.lists(boxes_1d, min_size=1, max_size=3), piece=st.sampled_from([4, 12, 64, 1 << 20]))
def test_content_of_any_boxes_in_row_major_order(splits: list[list[int]], piece: int) -> None:
    """A tensor cut into a grid of boxes gives its row-major bytes."""
    shape = tuple(sum(split) for split in splits)
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    edges = [np.cumsum([0, *split]) for split in splits]
    data, chunks = b"", []
    for corner in reversed(list(np.ndindex(*(len(split) for split in splits)))):
        offsets = tuple(int(edges[dim][at]) for dim, at in enumerate(corner))
        sizes = tuple(splits[dim][at] for dim, at in enumerate(corner))
        box = array[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
        raw = np.ascontiguousarray(box).tobytes()
        chunks.append(Chunk("f", len(data), len(data) + len(raw), offsets, sizes))
        data += raw
    entry = TensorEntry("F32", shape, tuple(chunks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diff, "PIECE_BYTES", piece)
        pieces = content_of(entry, lambda file, begin, end: memoryview(data)[begin:end])
        assert b"".join(bytes(one) for one in pieces) == array.tobytes()


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({}, {}, {}),
        ({"a": 1}, {"a": 1}, {}),
        ({"a": 1}, {"a": 2}, {"a": [1, 2]}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}, {"a.c": [2, None]}),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, {"a[1].b": [2, 3]}),
        ({"a": [1]}, {"a": [1, 2]}, {"a": [[1], [1, 2]]}),
        ({"a": {"b": 1}}, {"a": 3}, {"a": [{"b": 1}, 3]}),
        ({}, {"a": {"b": 1}}, {"a": [None, {"b": 1}]}),
    ],
)
def test_changes_table_matches(before: dict, now: dict, expected: dict) -> None:
    assert changes(before, now) == expected
