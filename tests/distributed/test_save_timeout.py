"""When a save is given up by default: by the bytes of the largest rank and the measured rates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks

from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.save import pipeline

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed")

SAVES = 4
Bound = tuple[int, list[float], float]
"""Bytes and rates that a bound was worked out from, and the seconds."""


def save_unequal_parts(folder: str) -> tuple[list[Bound], list[float], int]:
    """Rank 1 has most, rank 2 nothing. Returns the bounds, the seconds of the saves, and the bytes here."""
    rank, bounds, totals = dist.get_rank(), [], []
    bound = pipeline.automatic_timeout_s
    state = {f"own{rank}": torch.ones([1000, 1_000_000, 0][rank])} if rank < 2 else {}

    def noted(size_bytes: int, rates: Sequence[float]) -> float:
        bounds.append((size_bytes, list(rates), bound(size_bytes, rates)))
        return bounds[-1][2]

    with pytest.MonkeyPatch.context() as patch, AsyncCheckpointer("async") as checkpointer:
        patch.setattr(pipeline, "automatic_timeout_s", noted)
        for number in range(SAVES):
            checkpointer.save(state, f"{folder}/c{number}")
            result = checkpointer.wait()
            assert result is not None
            totals.append(result.total_s)
        return bounds, totals, checkpointer.host_bytes


def test_save_timeout_follows_bytes_and_measured_rates(tmp_path: Path) -> None:
    (bounds, totals, _), *others = run_ranks(save_unequal_parts, 3, str(tmp_path))
    largest = max(size_bytes for _, _, size_bytes in others)
    assert largest > 4_000_000
    for number, (size_bytes, rates, _) in enumerate(bounds):
        assert size_bytes == largest
        assert rates == pytest.approx([largest / total_s for total_s in totals[:number]])
    assert len(bounds) == SAVES
    assert all(other[:2] == (bounds, totals) for other in others), "one bound for all ranks"


def test_save_timeout_is_ten_times_slowest_of_rates() -> None:
    first = pipeline.automatic_timeout_s(100 * 10**9, [])
    assert first == 10 * 100e9 / 20e6
    assert pipeline.automatic_timeout_s(100 * 10**9, [1e9, 0.5e9, 2e9]) == 10 * 100 / 0.5
    assert pipeline.automatic_timeout_s(10**6, [1e9]) == 600


def test_save_of_no_tensors_can_be_repeated(tmp_path: Path) -> None:
    with AsyncCheckpointer("async") as checkpointer:
        for number in range(3):
            checkpointer.save({"epoch": number}, tmp_path / f"c{number}")
    assert len(list(tmp_path.iterdir())) == 3
