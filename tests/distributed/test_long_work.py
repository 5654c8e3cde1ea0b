"""Work of rank 0 that lasts longer than the time-out of the group: real ranks, real time-outs."""

from __future__ import annotations

import datetime
import functools
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from support.patch_target import patch_target
from support.ranks import run_ranks
from support.runs import Launcher, make_run

from kempnerforge import process_identity
from kempnerforge.checkpoint.run import attempt_start, lease
from kempnerforge.checkpoint.run.attempt_start import open_run
from kempnerforge.distributed.consensus import ControlGroup
from kempnerforge.process_identity import ProcessIdentity

pytest_plugins = ["support.run_fixtures"]

TIMEOUT_S = 2.0
DIGEST_FILE = patch_target("kempnerforge.data.prepare:digest_file")


def impatient_control() -> ControlGroup:
    """A control group that waits for ``TIMEOUT_S`` only. Collective."""
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))
    assert isinstance(group, dist.ProcessGroup)
    return ControlGroup(group)


def watch_lease_for_long(folder: str) -> tuple[int, str]:
    """Open a run that another host left: its lease is watched for longer than the group waits."""
    attempt_start.acquire = functools.partial(lease.acquire, stale_after_s=2 * TIMEOUT_S)  # type: ignore[assignment]
    control = impatient_control()
    record, held = open_run(Path(folder), control, first_global_batch_size=1)
    if held is not None:
        held.release()
    return record.attempt, held.took_over if held is not None else ""


def test_long_work_lease_watched_beyond_timeout_is_taken(tmp_path: Path) -> None:
    owner = replace(ProcessIdentity.of_this_process(3), host="node7", boot_id="another-kernel", pid=1)
    (tmp_path / "lease.3.json").write_bytes(process_identity.encode(owner, counter=7, released=False))
    first, second = run_ranks(watch_lease_for_long, 2, str(tmp_path))
    assert (first[0], second[0]) == (4, 4)
    assert f"its lease has not moved for {2 * TIMEOUT_S:g} s" in first[1]


def test_long_work_tokenising_beyond_timeout_trains(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    cache = {"data.cache_dir": str(tmp_path / "cache")}  # nothing is prepared yet
    run = make_run(tmp_path, corpus, **{"train.max_steps": 4, "distributed.timeout_s": 5.0}, **cache)
    slow = ("slow_calls", {"target": DIGEST_FILE, "seconds": 1.0, "rank": 0})
    ended = launcher.run(run, ranks=2, faults=[slow])
    assert ended.statuses == [0, 0], ended.output
    assert run.record["last_exit"]["step"] == 4


def hang(how: str, pipe: str) -> str:
    """Rank 0 hangs in its work until rank 1 has given it up. Returns what rank 1 says."""
    control, pids = impatient_control(), [0, 0]
    dist.all_gather_object(pids, os.getpid())

    def work() -> None:
        if how == "in a file":
            with open(pipe, "rb"):  # opens when somebody writes
                return
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.1)  # the signal is on its way

    if dist.get_rank() == 0:
        try:
            control.run_on_rank0(work)
        except RuntimeError as error:  # nobody is there to take the result, if it was noticed in time
            return str(error)
        return ""
    with pytest.raises(TimeoutError) as caught:
        control.run_on_rank0(work)
    if how == "in a file":
        with open(pipe, "wb"):
            pass
    os.kill(pids[0], signal.SIGCONT)
    return str(caught.value)


@pytest.mark.parametrize("how", ["in a file", "stopped"])
def test_long_work_that_hangs_ends_other_ranks(tmp_path: Path, how: str) -> None:
    """A thread that beats beside work that hangs would keep them for ever."""
    os.mkfifo(tmp_path / "pipe")
    _, told = run_ranks(hang, 2, how, str(tmp_path / "pipe"))
    assert "it has shown no progress for 2 s" in told


def brief_work() -> tuple[int, bool]:
    """A brief work asks the store nothing."""
    control = ControlGroup(dist.group.WORLD)
    heard = []
    control._share = lambda *_: heard.append(1)  # type: ignore[method-assign, assignment, return-value]
    return control.run_on_rank0(lambda: 7, brief=True), bool(heard)


def test_long_work_brief_work_waits_in_the_broadcast() -> None:
    assert run_ranks(brief_work, 2) == [(7, False), (7, False)]
