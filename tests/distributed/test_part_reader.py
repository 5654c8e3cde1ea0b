"""Reading straight into tensors: one copy, digested there, and never a wrong byte that is not noticed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from kempnerforge import fsio
from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.format import checksums
from kempnerforge.checkpoint.format.checksums import VerifiedFile
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors
from kempnerforge.errors import DamagedCheckpointError, MismatchError

pytestmark = pytest.mark.smoke

Tensors = dict[str, torch.Tensor]
BIG = 5_000_000
SHARD = "shard_00000_of_00001.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Tensors]:
    """Three blocks of 16 MiB and a bit, with small tensors between large ones."""
    tensors = {f"a.{number}": torch.rand(number + 1, 3) for number in range(50)}
    tensors |= {"b": torch.rand(BIG), "c": torch.rand(BIG // 10, 15), "d": torch.rand(7).bfloat16()}
    AsyncCheckpointer().save(tensors, tmp_path / "c")
    return tmp_path / "c", tensors


def zeros(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def check(loaded: Tensors, tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the blocks of shards that went through a buffer."""
    buffered: list[int] = []
    read_block = VerifiedFile._read_block

    def counted(self: VerifiedFile, number: int, **options: bool) -> memoryview:
        if self.path.name == SHARD:
            buffered.append(number)
        return read_block(self, number, **options)

    monkeypatch.setattr(VerifiedFile, "_read_block", counted)
    return buffered


def test_part_reader_tiled_blocks_skip_buffer(saved: tuple[Path, Tensors], blocks: list[int]) -> None:
    path, tensors = saved
    loaded = zeros(tensors)
    load_tensors(loaded, SafetensorsReader(path))
    check(loaded, tensors)
    assert blocks == [0], "the block of the header, which no tensor wants, and no other"


def test_part_reader_gap_costs_one_buffered_block(saved: tuple[Path, Tensors], blocks: list[int]) -> None:
    path, tensors = saved
    wanted = {name: tensor for name, tensor in tensors.items() if name != "d"}
    loaded = zeros(wanted)
    load_tensors(loaded, SafetensorsReader(path))
    check(loaded, wanted)
    assert len(blocks) == len(set(blocks)) <= 2


def test_part_reader_noncontiguous_target_is_filled(saved: tuple[Path, Tensors]) -> None:
    path, tensors = saved
    backing = torch.zeros(15, BIG // 10)
    loaded = zeros(tensors) | {"c": backing.t()}
    load_tensors(loaded, SafetensorsReader(path))
    check(loaded, tensors)


def test_part_reader_wrong_read_is_repeated(
    saved: tuple[Path, Tensors], blocks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tensors = saved
    scattered = fsio.read_scattered
    flips = [1, 0, 0]

    def flaky(fd: int, buffers: Sequence[memoryview], offset: int) -> bool:
        whole = scattered(fd, buffers, offset)
        if flips and flips.pop(0):
            buffers[0][0] ^= 1
        return whole

    monkeypatch.setattr(fsio, "read_scattered", flaky)
    loaded = zeros(tensors)
    load_tensors(loaded, SafetensorsReader(path))
    check(loaded, tensors)
    assert len(blocks) == 2, "the header's, and the one that was wrong"


@pytest.mark.parametrize("at", [16 << 20, (16 << 20) + 5_000_000, -1])
def test_part_reader_flipped_bit_is_found(saved: tuple[Path, Tensors], at: int) -> None:
    path, tensors = saved
    data = bytearray((path / SHARD).read_bytes())
    data[at] ^= 4
    (path / SHARD).write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match="wrong digest"):
        load_tensors(zeros(tensors), SafetensorsReader(path))


def test_part_reader_small_reads_are_merged(
    saved: tuple[Path, Tensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tensors = saved
    calls: list[int] = []
    scattered = fsio.read_scattered
    monkeypatch.setattr(
        fsio, "read_scattered", lambda *args: (calls.append(sum(map(len, args[1]))), scattered(*args))[1]
    )
    load_tensors(zeros(tensors), SafetensorsReader(path))
    assert max(calls) <= checksums._GROUP_BYTES
    assert len(calls) <= sum(calls) / checksums._GROUP_BYTES + 3


def test_part_reader_other_shape_is_mismatch(saved: tuple[Path, Tensors]) -> None:
    with pytest.raises(MismatchError, match=r"b is \(5000000,\) in c and \(3,\) here"):
        load_tensors({"b": torch.zeros(3)}, SafetensorsReader(saved[0]))
