"""The harness of all multi-rank tests: results by rank, and failures that say what happened."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from support.ranks import RanksFailed, run_ranks


def _total(values: list[int]) -> tuple[int, int, str]:
    tensor = torch.tensor(values[dist.get_rank()])
    dist.all_reduce(tensor)
    return dist.get_rank(), int(tensor), os.environ["FROM_THE_TEST"]


def _fail_on_rank_1(how: str) -> None:
    if dist.get_rank() == 0:
        dist.barrier()
    if how == "raise":
        raise ValueError("no such luck")
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    print("before the hang", flush=True)
    time.sleep(600)


def test_results_come_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_THE_TEST", "yes")
    assert run_ranks(_total, 3, [1, 10, 100]) == [(0, 111, "yes"), (1, 111, "yes"), (2, 111, "yes")]


@pytest.mark.parametrize(("how", "told"), [("raise", "ValueError: no such luck"), ("die", "SIGKILL")])
def test_a_failing_rank_is_named_with_its_cause(how: str, told: str) -> None:
    with pytest.raises(RanksFailed, match=f"(?s)rank 1 failed.*{told}"):
        run_ranks(_fail_on_rank_1, 2, how, timeout_s=60)


def test_a_hanging_rank_is_killed_and_shows_where_it_stood(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RanksFailed, match=r"ranks \[0, 1\] have not ended"):
        run_ranks(_fail_on_rank_1, 2, "hang", timeout_s=3)
    output = capsys.readouterr().out
    assert "before the hang" in output
    assert "in _fail_on_rank_1" in output
