"""index.bin: what goes in comes out, and nothing wrong is believed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kempnerforge import fsio
from kempnerforge.checkpoint.format import checksums, tensor_index
from kempnerforge.checkpoint.format.checksums import VerifiedFile, record_of
from kempnerforge.checkpoint.format.tensor_index import Chunk, Index, TensorEntry
from kempnerforge.errors import DamagedCheckpointError


def open_index(folder: Path, data: bytes) -> Index:
    path = folder / "index.bin"
    path.write_bytes(data)
    return Index(VerifiedFile(path, record_of(data), keep=True))


def whole(shape: tuple[int, ...], file: str = "a") -> TensorEntry:
    size = 4
    for length in shape:
        size *= length
    return TensorEntry("F32", shape, (Chunk(file, 100, 100 + size, (0,) * len(shape), shape),))


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, shapes, max_size=12))
def test_index_round_trip_equal(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[int, ...]]
) -> None:
    entries = {name: whole(shape, file=f"shard_{len(name)}") for name, shape in tensors.items()}
    opened = open_index(tmp_path_factory.mktemp("index"), tensor_index.encode(entries))
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
def test_index_chunks_must_cover_tensor_once(tmp_path: Path, entry: TensorEntry, problem: str | None) -> None:
    opened = open_index(tmp_path, tensor_index.encode({"w": entry}))
    if problem is None:
        assert opened["w"] == entry
    else:
        with pytest.raises(DamagedCheckpointError, match=problem):
            opened["w"]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_index_wrong_bytes_are_damage_not_crash(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Wrong bytes under a right digest: damage, or unnoticed, but no other error."""
    good = tensor_index.encode({"w": two_rows(TOP, BOTTOM), "v": whole((3,)), "x": whole(())})
    position = data.draw(st.integers(0, len(good) - 1))
    value = data.draw(st.integers(0, 255))
    bad = good[:position] + bytes([value]) + good[position + 1 :]
    try:
        opened = open_index(tmp_path_factory.mktemp("index"), bad)
        list(opened.items())
    except DamagedCheckpointError:
        pass


GRIDS = {"rows": (40, 1), "columns": (1, 40), "grid": (8, 6), "few": (2, 2)}


def grid(rows: int, columns: int) -> TensorEntry:
    """A tensor of 2 x 3 elements a chunk."""
    chunks = [
        Chunk(
            f"f{row % 3}",
            24 * (row * columns + column),
            24 * (row * columns + column + 1),
            (2 * row, 3 * column),
            (2, 3),
        )
        for row in range(rows)
        for column in range(columns)
    ]
    return TensorEntry("F32", (2 * rows, 3 * columns), tuple(chunks))


@pytest.mark.parametrize("layout", GRIDS)
def test_index_part_has_chunks_that_meet_box(tmp_path: Path, layout: str) -> None:
    entry = grid(*GRIDS[layout])
    opened = open_index(tmp_path, tensor_index.encode({"v": whole((3,)), "w": entry}))
    height, width = entry.shape
    for offsets, sizes in [
        ((0, 0), entry.shape),
        ((1, 1), (height - 2, width - 2)),
        ((height - 1, width - 1), (1, 1)),
        ((height - 2, 0), (2, width)),
        ((0, 0), (0, width)),
    ]:
        met = [
            chunk
            for chunk in entry.chunks
            if all(
                a < b + n and b < a + m
                for a, m, b, n in zip(chunk.offsets, chunk.sizes, offsets, sizes, strict=True)
            )
        ]
        assert opened.part("w", offsets, sizes) == ([] if 0 in sizes else met)
    with pytest.raises(KeyError):
        opened.part("x", (0, 0), (1, 1))


@pytest.mark.parametrize("layout", GRIDS)
def test_index_part_hole_or_overlap_is_damage(tmp_path: Path, layout: str) -> None:
    entry = grid(*GRIDS[layout])
    first, *others = entry.chunks
    shifted = Chunk(first.file, first.begin, first.end, others[0].offsets, first.sizes)
    for chunks in (tuple(others), (*others, shifted)):
        opened = open_index(tmp_path, tensor_index.encode({"w": TensorEntry("F32", entry.shape, chunks)}))
        with pytest.raises(DamagedCheckpointError, match=r"w: chunks (hold|overlap)"):
            opened.part("w", (0, 0), entry.shape)
        assert opened.part("w", others[-1].offsets, (2, 3)) == [others[-1]]


def test_index_lookup_reads_few_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 4096)
    names = [f"layers.{number:05d}.weight" for number in range(4000)]
    data = tensor_index.encode({name: whole((number % 7 + 1,)) for number, name in enumerate(names)})
    opened = open_index(tmp_path, data)
    reads: list[int] = []
    read_range = fsio.read_range
    monkeypatch.setattr(fsio, "read_range", lambda *args: (reads.append(args[2]), read_range(*args))[1])
    assert opened.part(names[1234], (0,), (3,)) == [Chunk("a", 100, 112, (0,), (3,))]
    assert len(reads) < 12 < len(data) // 4096
    assert opened.has_prefix("layers.03")
    assert not opened.has_prefix("optimizer.")
    assert names[17] in opened
    assert "layers.00017" not in opened
    assert len(reads) < 36
    for name in names:
        opened.head(name)
    assert len(reads) == len(set(reads)), "no block is read twice"
