"""A profile that is requested while a run goes on, and what a run says when device memory runs out."""

from __future__ import annotations

import gzip
import json
import signal
from pathlib import Path

import pytest
from support.polling import wait_until
from support.run_files import tensor_digests
from support.runs import Attempt, Launcher, Run, make_run

pytest_plugins = ["support.run_fixtures"]

LONG = {"train.max_steps": 4000, "checkpoint.interval": 0, "eval.interval": 0, "metrics.log_interval": 500}


def request(run: Run, text: str) -> None:
    part = run.folder / ".part"
    part.write_text(text)
    part.rename(run.folder / "profile.request")


def traces(run: Run) -> list[str]:
    return sorted(path.name for path in (run.folder / "profiles").glob("*"))


def wait_for_output(attempt: Attempt, text: str) -> None:
    wait_until(lambda: text in attempt.output(), text)


def test_profile_request_writes_traces_of_same_steps(
    launcher: Launcher, corpus: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path, corpus, **LONG)
    attempt = launcher.start(run, ranks=2)
    wait_until(lambda: len(run.rows()) >= 5, "five steps")
    request(run, "many")
    wait_for_output(attempt, '"many" is not a request: write a number of steps and optionally ranks')
    request(run, "2 all")
    wait_for_output(attempt, ".json.gz (ranks 0, 1)")
    request(run, "")
    wait_for_output(attempt, ".json.gz (ranks 0)")
    attempt.signal(signal.SIGTERM)
    ended = attempt.wait()
    assert ended.statuses == [75, 75], ended.output
    assert ended.output.count("is not a request") == 1
    assert not (run.folder / "profile.request").exists()
    first, other, alone = (name.split("_") for name in traces(run))
    assert [first[3], other[3], alone[3]] == ["0.json.gz", "1.json.gz", "0.json.gz"]
    assert first[1] == other[1] < alone[1]
    for name, steps in zip(traces(run), (2, 2, 3), strict=True):
        trace = json.loads(gzip.decompress((run.folder / "profiles" / name).read_bytes()))
        updates = [event for event in trace["traceEvents"] if event["name"].startswith("Optimizer.step#")]
        assert len(updates) == steps


@pytest.mark.smoke
def test_profile_that_fails_changes_nothing(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    plain = make_run(tmp_path / "plain", corpus)
    launcher.finish(plain)
    run = make_run(tmp_path / "profiled", corpus)
    run.folder.mkdir()
    (run.folder / "profiles").touch()  # so that the folder cannot be made
    request(run, "3")
    ended = launcher.finish(run)
    assert "profile of steps 1 to 3 failed: rank 0: NotADirectoryError: " in ended.output, ended.output
    assert run.counting() == plain.counting()
    assert tensor_digests(run.step_folder(12)) == tensor_digests(plain.step_folder(12))


def test_out_of_device_memory_names_largest_holders(launcher: Launcher, corpus: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, corpus)
    oom = ("crash_at_loss", {"how": "oom", "call": 11, "rank": 1})
    ended = launcher.run(run, ranks=2, faults=[oom])
    assert ended.statuses[1] == 1, ended.output
    [line] = [line for line in ended.outputs[1].splitlines() if line.startswith("out of device memory")]
    # The rank holds half of the 73,952 parameters in fp32, and Adam two moments of them. The gradients
    # of the step before are gone.
    assert line.startswith("out of device memory on rank 1: parameters 0.14 MiB, gradients 0.00 MiB, "), line
    assert "optimizer state 0.28 MiB; largest modules: tok_embeddings 0.05 MiB, output 0.05 MiB, " in line
    assert "torch.OutOfMemoryError" in ended.outputs[1]
