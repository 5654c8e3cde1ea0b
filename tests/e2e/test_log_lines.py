"""What ranks print, and what ``KEMPNERFORGE_LOG=debug`` adds for a bug report."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.runs import Launcher, make_run

pytest_plugins = ["support.run_fixtures"]

SETTINGS = {"train.max_steps": 4, "eval.interval": 0}
HEAD = re.compile(r"\d{4}-\d\d-\d\d [\d:]{8}\.\d{3} rank (\d) (\w+) kempnerforge\.([\w.]+): (.*)")


def test_log_of_two_ranks_without_and_with_debug(
    launcher: Launcher, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "plain", corpus, **SETTINGS)
    first, second = launcher.finish(run, ranks=2).outputs
    assert second == ""
    printed = [line for line in first.splitlines() if not re.match(r"step \d|checkpoint step", line)]
    starts = (
        "data: scanning ",
        "data: ",
        "run run, attempt 1: ",
        "length: ",
        "fresh start",
        "finished at step 4",
    )
    assert [line for line, start in zip(printed, starts, strict=False) if not line.startswith(start)] == []

    monkeypatch.setenv("KEMPNERFORGE_LOG", "debug")
    run = make_run(tmp_path / "debug", corpus, **SETTINGS)
    outputs = launcher.finish(run, ranks=2).outputs
    found = [HEAD.fullmatch(line) for output in outputs for line in output.splitlines()]
    lines = [match.groups() for match in found if match is not None]
    for rank in "01":
        modules = {module for of_rank, _, module, _ in lines if of_rank == rank}
        assert {"distributed.context", "checkpoint.save.writer_client", "train.step_consensus"} <= modules
    told = [text for rank, level, _, text in lines if (rank, level) == ("0", "INFO")]
    assert len(told) == len(printed)
    assert told[-1].startswith("finished at step 4")
    assert ("0", "DEBUG", "checkpoint.save.commit") in [line[:3] for line in lines]
