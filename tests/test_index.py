"""index.bin: what goes in comes out, and nothing wrong is believed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kempnerforge.checkpoint import index
from kempnerforge.checkpoint.digest import VerifiedFile, record_of
from kempnerforge.checkpoint.index import Chunk, Index, TensorEntry
from kempnerforge.errors import DamagedCheckpointError


def open_index(folder: Path, data: bytes) -> Index:
    path = folder / "index.bin"
    path.write_bytes(data)
    return Index(VerifiedFile(path, record_of(data)))


def whole(shape: tuple[int, ...], file: str = "a") -> TensorEntry:
    size = 4
    for length in shape:
        size *= length
    return TensorEntry("F32", shape, (Chunk(file, 100, 100 + size, (0,) * len(shape), shape),))


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, shapes, max_size=12))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[int, ...]]) -> None:
    entries = {name: whole(shape, file=f"shard_{len(name)}") for name, shape in tensors.items()}
    opened = open_index(tmp_path_factory.mktemp("index"), index.encode(entries))
    assert dict(opened) == entries
    assert list(opened) == sorted(entries, key=str.encode)
    assert len(opened) == len(entries)
    assert "no such name at all" not in opened


def two_rows(first: Chunk, second: Chunk) -> TensorEntry:
    return TensorEntry("F32", (4, 2), (first, second))


TOP = Chunk("a", 0, 16, (0, 0), (2, 2))
BOTTOM = Chunk("b", 0, 16, (2, 0), (2, 2))


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (two_rows(TOP, BOTTOM), None),
        (TensorEntry("F32", (4, 2), (TOP,)), "chunks hold 4 of 8 elements"),
        (two_rows(TOP, Chunk("b", 0, 16, (1, 0), (2, 2))), "chunks overlap"),
        (two_rows(TOP, Chunk("b", 0, 16, (3, 0), (2, 2))), "does not fit"),
        (two_rows(TOP, Chunk("b", 0, 12, (2, 0), (2, 2))), "does not fit"),
        (TensorEntry("F33", (1,), (Chunk("a", 0, 4, (0,), (1,)),)), "unknown"),
        (TensorEntry("F32", (), (Chunk("a", 0, 4, (), ()),)), None),
        (TensorEntry("F32", (0, 3), (Chunk("a", 0, 0, (0, 0), (0, 3)),)), None),
    ],
)
def test_chunks_must_cover_a_tensor_exactly_once(
    tmp_path: Path, entry: TensorEntry, problem: str | None
) -> None:
    opened = open_index(tmp_path, index.encode({"w": entry}))
    if problem is None:
        assert opened["w"] == entry
    else:
        with pytest.raises(DamagedCheckpointError, match=problem):
            opened["w"]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_wrong_bytes_with_a_right_digest_are_damage_not_a_crash(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    good = index.encode({"w": two_rows(TOP, BOTTOM), "v": whole((3,)), "x": whole(())})
    position = data.draw(st.integers(0, len(good) - 1))
    value = data.draw(st.integers(0, 255))
    bad = good[:position] + bytes([value]) + good[position + 1 :]
    try:
        opened = open_index(tmp_path_factory.mktemp("index"), bad)
        list(opened.items())
    except DamagedCheckpointError:
        pass
