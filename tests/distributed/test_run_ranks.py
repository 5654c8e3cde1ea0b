"""The harness of all multi-rank tests: results by rank, and failures that say what happened."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from support import ranks
from support.ranks import RanksFailed, run_ranks

pytestmark = pytest.mark.smoke


def _total(values: list[int]) -> tuple[int, int, str]:
    tensor = torch.tensor(values[dist.get_rank()])
    dist.all_reduce(tensor)
    return dist.get_rank(), int(tensor), os.environ["FROM_THE_TEST"]


def _fail_on_rank_1(how: str, marks: str = "") -> None:
    if dist.get_rank() == 0:
        if marks:
            Path(marks, "0").touch()
        dist.barrier()
    if how == "raise":
        raise ValueError("no such luck")
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    print("before the hang", flush=True)
    Path(marks, "1").touch()
    time.sleep(600)


def test_run_ranks_results_come_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_THE_TEST", "yes")
    assert run_ranks(_total, 3, [1, 10, 100]) == [(0, 111, "yes"), (1, 111, "yes"), (2, 111, "yes")]


@pytest.mark.parametrize(("how", "reported"), [("raise", "ValueError: no such luck"), ("die", "SIGKILL")])
def test_run_ranks_failing_rank_named_with_cause(how: str, reported: str) -> None:
    with pytest.raises(RanksFailed, match=f"(?s)rank 1 failed.*{reported}"):
        run_ranks(_fail_on_rank_1, 2, how, timeout_s=60)


def test_run_ranks_hanging_rank_killed_with_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def monotonic() -> float:
        """The time-out is over as soon as both ranks hang."""
        return time.monotonic() + (1000 if len(list(tmp_path.iterdir())) == 2 else 0)

    monkeypatch.setattr(ranks, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))
    monkeypatch.setattr(ranks, "wait", lambda pipes, timeout: wait(pipes, min(timeout, 0.05)))
    with pytest.raises(RanksFailed, match=r"ranks \[0, 1\] have not ended"):
        run_ranks(_fail_on_rank_1, 2, "hang", str(tmp_path), timeout_s=100)
    output = capsys.readouterr().out
    assert "before the hang" in output
    assert "in _fail_on_rank_1" in output
