"""Faults at every operation of every process of a save: errors, short writes, kills, stops, a slow disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.crash.crash_campaign import RecordingOf, record
from support.crash.fault_campaign import (
    ALWAYS,
    KILLED_STEPS,
    check_strikes,
    every_kill,
    every_strike,
    kill_all,
    operations_of_a_save,
    sample,
)
from support.crash.file_watcher import Control
from support.crash.save_driver import STALL_TIMEOUT_S, Plan, Strike, Struck, save_under_faults
from support.ranks import run_ranks
from support.tmpfs import mounted_tmpfs

from kempnerforge.checkpoint.async_save import AsyncCheckpointer
from kempnerforge.checkpoint.load.dcp_reader import SafetensorsReader, load_tensors
from kempnerforge.checkpoint.save.pipeline import RetryPolicy
from kempnerforge.config.schema import AsyncCheckpointMode
from kempnerforge.errors import SaveFailedError

pytest_plugins = ["support.crash.fixtures"]

SEED = 20261122
CASE = (2, 1, False)


def strike_all(base: Path, strikes: list[Strike], *, ranks: int = 2, **plan: object) -> list[list[Struck]]:
    run_dir, control = base / "run", base / "control"
    run_dir.mkdir()
    Control(control)
    made = Plan(str(run_dir), log=str(base / "log"), control=str(control), **plan)  # type: ignore[arg-type]
    return run_ranks(save_under_faults, ranks, made, strikes, timeout_s=560.0)


def test_save_sampled_faults_commit_or_fail_cleanly(recorded: RecordingOf, scratch: Path) -> None:
    every = every_strike(operations_of_a_save(recorded(CASE).attempts))
    counts = check_strikes(strike_all(scratch, sample(every, 30, SEED)))
    assert counts["committed"] >= 5
    assert counts["failed cleanly"] >= 5


def test_save_fault_at_request_file_costs_no_run(scratch: Path) -> None:
    (struck,), _ = strike_all(scratch, [Strike("rank0", 0, "EIO")], reason="requested")
    assert (struck.fired, struck.after.error) == (1, "")


@pytest.mark.parametrize("kind", ["kill", "stop"])
def test_save_writer_lost_on_one_rank_is_replaced(scratch: Path, kind: str) -> None:
    strikes = [Strike("writer1", 2, kind), Strike("writer1", 1, kind, count=ALWAYS)]
    by_rank = strike_all(scratch, strikes)
    check_strikes(by_rank)
    assert [struck.fired for struck in by_rank[0]] == [1, 3]
    assert [bool(struck.hit.error) for struck in by_rank[0]] == [False, True]
    assert "rank 1: writer process" in by_rank[0][1].hit.error
    assert [[struck.hit.replaced for struck in of_rank] for of_rank in by_rank] == [[False] * 2, [True] * 2]


def test_save_slow_disk_is_not_a_hang(scratch: Path) -> None:
    """All operations together take longer than a hang may, each alone does not."""
    operation_s = 0.6 * STALL_TIMEOUT_S
    strikes = [Strike("writer1", 0, "delay", count=ALWAYS, value=0.3)]
    by_rank = strike_all(scratch, strikes, operation_s=operation_s)
    assert by_rank[0][0].fired >= 4
    assert [(of_rank[0].hit.error, of_rank[0].hit.replaced) for of_rank in by_rank] == [("", False)] * 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_tmpfs(tmp_path / "disk", "size=8m", lazy=True) as folder:
        yield folder


def fill_the_disk(folder: str) -> list[str]:
    """Rank 1 has too much in the second save, in which rank 0 has nothing that could fail first."""
    rank, errors = dist.get_rank(), []
    patience = RetryPolicy(write_tries=2, first_pause_s=0.01, save_timeout_s=30)
    made = AsyncCheckpointer(AsyncCheckpointMode.async_, patience=patience)
    for step, elements in enumerate([200_000, 2_000_000 if rank == 1 else 200_000, 200_000]):
        tensors = {f"w{rank}": torch.full((elements,), float(step))}
        made.save({} if (rank, step) == (0, 1) else tensors, f"{folder}/c{step}")
        try:
            made.wait()
            errors.append("")
        except SaveFailedError as error:
            errors.append(str(error))
    made.close()
    return errors


def test_save_disk_full_on_one_rank_fails_on_all(small_disk: Path) -> None:
    first, second = run_ranks(fill_the_disk, 2, str(small_disk))
    assert first == second
    assert [bool(error) for error in first] == [False, True, False]
    assert "rank 1: " in first[1]
    assert "No space left on device" in first[1]
    assert sorted(os.listdir(small_disk)) == ["c0", "c2"]
    loaded = {f"w{rank}": torch.zeros(200_000) for rank in range(2)}
    load_tensors(loaded, SafetensorsReader(small_disk / "c2"))
    assert all(torch.equal(tensor, torch.full((200_000,), 2.0)) for tensor in loaded.values())


def kills(base: Path) -> list[Strike]:
    return every_kill(record(base, ranks=2, keep_last_n=1, steps=KILLED_STEPS, wait=True).attempts)


def test_resume_sampled_kills_use_newest_commit(scratch: Path) -> None:
    assert kill_all(scratch, sample(kills(scratch), 2, SEED)).total() == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_resume_every_kill_uses_newest_commit(tmp_path: Path) -> None:
    print(f"kills: {dict(kill_all(tmp_path, kills(tmp_path)))}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("no_direct", [False, True])
def test_save_every_fault_commits_or_fails_cleanly(
    recorded: RecordingOf, tmp_path: Path, no_direct: bool
) -> None:
    every = every_strike(operations_of_a_save(recorded((2, 1, no_direct)).attempts))
    print(f"faults: {dict(check_strikes(strike_all(tmp_path, every, no_direct=no_direct)))}")
