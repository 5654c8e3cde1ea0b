"""``kempnerforge report`` on a run that was killed five times, and its page in a real browser."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from html import escape
from pathlib import Path
from typing import Any

import pytest
from support.browser import DARK, Seen, missing_browser, open_page
from support.patch_target import patch_target
from support.runs import Launcher, Run, copy_run, make_run

from kempnerforge.goodput.history import read_history
from kempnerforge.train.run_facts import git_state

pytest_plugins = ["support.run_fixtures"]

BUILD_MODEL = patch_target("kempnerforge.train.setup:build_model")

needs_browser = pytest.mark.skipif(
    missing_browser() and not os.environ.get("KEMPNERFORGE_TEST_BROWSER"),
    reason="no chromium here; .ci/install-chromium installs it",
)
"""The variable is set by ``.ci/run``: there a missing browser is a failure."""
SETTINGS = {"train.max_steps": 20_000, "checkpoint.interval": 60, "eval.interval": 20}
LOSE = (4, 25, 10, 0, 18)
"""Steps above the newest commit from which on each attempt is killed; 0: in its set-up."""


TRAINING, LOST = (0x2A, 0x78, 0xD6), (0xE3, 0x49, 0x48)
"""Colours of the page in the light."""


def report(*arguments: object) -> subprocess.CompletedProcess[str]:
    return kempnerforge("report", *arguments)


def kempnerforge(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys\nfrom kempnerforge.cli.app import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def steps_to_lose(run: Run, attempt: int) -> int:
    """How far the ledger knows this attempt to be above what it has committed itself; 0 before that."""
    own = next((one for one in read_history(run.folder) if one.number == attempt), None)
    if own is None or not own.commits or not own.progress:
        return 0
    return own.progress[-1]["step"] - max(run.committed())


@pytest.fixture(scope="module")
def killed(launcher: Launcher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was killed five times by SIGKILL, once of these in its set-up, and then finished."""
    run = make_run(tmp_path_factory.mktemp("killed") / "base", corpus, **SETTINGS)
    for number, lose in enumerate(LOSE, 1):
        if lose == 0:
            ended = launcher.run(run, faults=[("kill_at_call", {"target": BUILD_MODEL})])
            assert ended.statuses == [-9], ended.output
            continue
        attempt = launcher.start(run)
        deadline = time.monotonic() + 120
        while steps_to_lose(run, number) < lose:
            assert time.monotonic() < deadline, attempt.output()
            time.sleep(0.005)
        attempt.kill()
        attempt.wait()
    launcher.finish(run, f"--train.max_steps={max(run.committed()) + 65}")
    return run


@pytest.fixture(scope="module")
def body(killed: Run) -> dict[str, Any]:
    """What ``--json`` says of it."""
    done = report(killed.folder, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_report_parts_of_killed_run_add_up(killed: Run, body: dict[str, Any]) -> None:
    """The run was killed five times."""
    parts, wall_s = body["parts_s"], body["wall_s"]
    assert abs(sum(parts.values()) - wall_s) <= 0.01 * wall_s
    assert all(seconds >= -0.01 * wall_s for seconds in parts.values()), parts
    for name in ("effective", "lost", "eval", "checkpoint", "setup", "load"):
        assert parts[name] > 0, name
    setup = body["setup_parts_s"]
    assert set(setup) == {"launch", "process_groups", "folder", "data", "model", "resume", "unfinished"}
    assert sum(setup.values()) == pytest.approx(parts["setup"])
    assert all(seconds >= -0.01 * wall_s for seconds in setup.values()), setup
    assert [one["kind"] for one in body["attempts"]] == ["lost"] * 5 + ["finished"]
    trained = [one for one in body["attempts"] if one["began_at"] is not None]
    last_steps = [one.last_step for one in read_history(killed.folder) if one.began_at is not None]
    for one, following, last_step in zip(trained, trained[1:], last_steps, strict=False):
        assert one["lost_steps"] == max(0, last_step - following["began_at"])
    assert sum(one["lost_steps"] for one in body["attempts"]) > 0
    for one, receipt in zip(trained, killed.receipts(), strict=True):
        assert one["began_at"] == receipt["step"]
        assert one["parts_s"]["load"] == pytest.approx(receipt["load_s"])


def test_report_saving_of_daly_interval_is_reported(killed: Run, body: dict[str, Any]) -> None:
    found = body["saving"]
    assert found["failures"] == 4, "the attempt that was killed in its set-up did not train"
    expected = found["expected"]
    assert expected["best_interval_s"] >= found["daly_s"] > 0
    assert found["interval_s"] > 0
    assert expected["saved_s"] <= body["wall_s"]
    done = report(killed.folder)
    assert done.returncode == 0, done.stderr
    assert "were effective training" in done.stdout
    assert "First-order estimate" in done.stdout


@pytest.fixture(scope="module")
def page(killed: Run) -> Path:
    """Its page."""
    file = killed.base / "page.html"
    done = report(killed.folder, "--html", file)
    assert done.returncode == 0, done.stderr
    assert f"wrote {file}" in done.stdout
    return file


@needs_browser
def test_report_page_shows_every_attempt_and_commit(
    killed: Run, body: dict[str, Any], page: Path, tmp_path: Path
) -> None:
    seen = open_page(page, tmp_path)
    assert_alone(seen)
    assert seen.dom.count('data-attempts="1"') == 6
    assert (
        sum(int(number) for number in re.findall(r'data-commits="(\d+)"', seen.dom))
        == body["saving"]["commits"]
    )
    assert body["saving"]["commits"] == len(read_commits(killed))
    assert seen.dom.count('class="bar c-lost" style="left') == sum(
        one["lost_steps"] > 0 for one in body["attempts"]
    )
    for figure in ("loss", "throughput", "timeline"):
        assert f'<figure id="{figure}"' in seen.dom
    assert f"{100 * body['ettr']:.1f}%" in seen.dom
    assert seen.count(*TRAINING) > seen.count(*LOST) > 0
    assert seen.corner() > 200


def read_commits(run: Run) -> list[dict[str, Any]]:
    lines = (run.folder / "ledger.jsonl").read_text().splitlines()
    return [event for line in lines if line and (event := json.loads(line))["event"] == "commit"]


def assert_alone(seen: Seen) -> None:
    """The page needs nothing but itself."""
    assert seen.requests == []
    assert seen.console == []
    assert not re.search(r"<(script|link|img|iframe)\b|url\(|@import", seen.dom)


@needs_browser
def test_report_page_html_in_fault_text_is_escaped(killed: Run, tmp_path: Path) -> None:
    run = copy_run(killed, tmp_path / "copy")
    html = '<script>document.title="owned"</script><img src=http://example.org/x.png onerror=a()>'
    end = {"event": "end", "attempt": 6, "time": time.time(), "kind": "fault", "reason": html, "step": 1}
    with (run.folder / "ledger.jsonl").open("a") as ledger:
        ledger.write(json.dumps(end) + "\n")
    file = tmp_path / "page.html"
    assert report(run.folder, "--html", file).returncode == 0
    seen = open_page(file, tmp_path / "browser")
    assert_alone(seen)
    assert "<title>run: report</title>" in seen.dom
    assert "&lt;script&gt;document.title=" in seen.dom


@needs_browser
def test_report_page_dark_preference_is_followed(page: Path, tmp_path: Path) -> None:
    seen = open_page(page, tmp_path, DARK)
    assert seen.corner() < 50


@needs_browser
def test_browser_check_detects_page_with_requests(tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    file.write_text('<img src="http://example.org/x.png"><script>console.error("no")</script>')
    seen = open_page(file, tmp_path)
    assert seen.requests == ["http://example.org/x.png"]
    assert len(seen.console) == 1
    assert seen.count(*TRAINING) == 0
    with pytest.raises(AssertionError):
        assert_alone(seen)


@needs_browser
def test_report_attempts_not_cut_on_a_phone(page: Path, tmp_path: Path) -> None:
    """Nothing of a section is wider than the screen, so that nothing needs to be scrolled aside.

    The page is measured from outside, in a frame: it may run no script itself.
    """
    measure = (
        "const page = document.querySelector('iframe').contentDocument;"
        "const wide = [...page.querySelectorAll('#attempts, #attempts .scroll, #run, main')]"
        ".filter(part => part.scrollWidth > part.clientWidth);"
        "document.body.dataset.measured = `${page.documentElement.clientWidth} px, ${wide.length} too wide`;"
    )
    frame = (
        f'<iframe width="390" height="900" style="border: 0" srcdoc="{escape(page.read_text())}"></iframe>'
    )
    file = tmp_path / "measured.html"
    file.write_text(f"<!DOCTYPE html><body>{frame}<script>onload = () => {{{measure}}}</script></body>")
    assert 'data-measured="390 px, 0 too wide"' in open_page(file, tmp_path).dom


def test_report_says_what_killed_run_is(killed: Run, body: dict[str, Any], page: Path) -> None:
    """The start records config, parameters, device and code, and each attempt what it changed."""
    facts = body["run"]
    first = next(json.loads(line) for line in (killed.folder / "ledger.jsonl").read_text().splitlines())
    assert first["event"] == "start"
    assert first["config"]["train.max_steps"] == SETTINGS["train.max_steps"]
    assert facts["config"]["train.max_steps"] == body["attempts"][-1]["last_step"]
    assert facts["parameters"] > 1000
    assert facts["device"] == "cpu"
    assert facts["tokens"] == killed.rows()[-1].get("train/tokens", facts["tokens"])
    assert 0 < facts["epochs"] == facts["tokens"] / facts["config"]["train.seq_len"] / facts["train_samples"]
    last = facts["max_steps"]
    changes = [attempt["changes"] for attempt in body["attempts"]]
    assert changes == [[]] * 5 + [[f"train.max_steps: {SETTINGS['train.max_steps']} -> {last}"]]
    for words in ('<section id="run"', '<figure id="lr"', '<figure id="grad_norm"', f"{last:,} of {last:,}"):
        assert words in page.read_text()


def test_run_list_of_killed_run(killed: Run) -> None:
    listed = kempnerforge("ls", killed.base, "--json")
    assert listed.returncode == 0, listed.stderr
    [state] = json.loads(listed.stdout)["runs"]
    newest = max(killed.committed())
    assert (state["state"], state["step"], state["committed"]) == ("finished", newest, newest)
    assert state["max_steps"] == newest
    shown = kempnerforge("ls", killed.base)
    assert f"finished  {newest:,}/{newest:,}" in shown.stdout


def test_git_state_commit_and_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        me = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *me, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert git_state(tmp_path) is None
    git("init", "-q")
    assert git_state(tmp_path) is None, "there is no commit yet"
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    (tmp_path / "untracked").touch()
    (tmp_path / "folder").mkdir()
    commit = git("rev-parse", "HEAD")
    assert git_state(tmp_path / "folder") == {"commit": commit, "dirty": False}
    (tmp_path / "code.py").write_text("2")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None, "without git, a start goes on"
