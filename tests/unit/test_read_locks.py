"""Readers that retention leaves alone, and those that it need not wait for."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from support.step_maker import write_step

from kempnerforge.checkpoint import holds
from kempnerforge.errors import StepNotFoundError


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return write_step(tmp_path / "checkpoints", 7)


def files(step: Path) -> list[Path]:
    return sorted((step.parent / "holds").glob("*"))


def test_a_hold_leaves_nothing_behind(step: Path) -> None:
    with holds.hold(step, what="verify"), holds.hold(step, what="export"):
        assert len(files(step)) == 2
        assert {name.partition(" ")[0] for name in holds.readers(step.parent)[7]} == {"verify", "export"}
    assert os.listdir(step.parent) == ["step_00000007"]


def test_a_hold_ends_with_an_error_too(step: Path) -> None:
    with pytest.raises(ZeroDivisionError), holds.hold(step, what="verify"):
        raise ZeroDivisionError
    assert os.listdir(step.parent) == ["step_00000007"]


def test_a_link_holds_what_it_points_at(step: Path) -> None:
    (step.parent / "latest").symlink_to(step.name)
    with holds.hold(step.parent / "latest", what="diff") as held:
        assert held
        assert list(holds.readers(step.parent)) == [7]


def test_a_step_that_is_gone_cannot_be_held(step: Path) -> None:
    with pytest.raises(StepNotFoundError), holds.hold(step.with_name("step_00000008"), what="verify"):
        pytest.fail("it was held")
    with pytest.raises(StepNotFoundError), holds.hold(step.parent / "no" / "step_00000008", what="verify"):
        pytest.fail("it was held")
    assert os.listdir(step.parent) == ["step_00000007"]


def test_folders_that_nothing_prunes_get_no_file(tmp_path: Path) -> None:
    path = write_step(tmp_path, 7).rename(tmp_path / "my_model")
    with holds.hold(path, what="verify") as held:
        assert not held
        assert os.listdir(tmp_path) == ["my_model"]


def test_a_reader_that_may_not_write_goes_on_without(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(holds.fsio, "write_new_file", refuse)
    with holds.hold(step, what="verify") as held:
        assert not held


def test_a_hold_is_renewed_and_comes_back_when_it_was_removed(
    step: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holds, "RENEW_EVERY_S", 0.02)
    with holds.hold(step, what="verify"):
        (path,) = files(step)
        os.utime(path, (1, 1))
        wait_until(lambda: path.stat().st_mtime > 1)
        path.unlink()
        wait_until(path.exists)
        assert holds.readers(step.parent) == {7: ["a reader"]}
    assert os.listdir(step.parent) == ["step_00000007"]


def wait_until(true: object) -> None:
    deadline = time.monotonic() + 10
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("age_s", "held"), [(0, True), (590, True), (610, False), (1e6, False), (-60, True)])
def test_a_hold_that_nobody_renews_ends(step: Path, age_s: float, held: bool) -> None:
    with holds.hold(step, what="verify"):
        now = time.time() + age_s
        assert (7 in holds.readers(step.parent, now=now)) == held
        holds.remove_stale(step.parent, now=now)
        assert bool(files(step)) == held


def test_holds_of_another_machine_are_judged_by_their_age_alone(step: Path) -> None:
    with holds.hold(step, what="verify"):
        (path,) = files(step)
        body = json.loads(path.read_text())
        body["reader"] |= {"host": "elsewhere", "boot_id": "another", "pid": 2**22 + 1}
        path.write_text(json.dumps(body))
        assert holds.readers(step.parent) == {7: [f"verify (pid {2**22 + 1} on elsewhere)"]}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"what": "x", "reader": {}}', "[" * 100_000])
def test_a_hold_that_cannot_be_parsed_is_one_that_is_being_written(step: Path, content: str) -> None:
    (step.parent / "holds").mkdir()
    (step.parent / "holds" / "step_00000007.0123456789abcdef.json").write_text(content)
    (step.parent / "holds" / "step_7.0123.json").write_text(content)
    (step.parent / "holds" / "README").write_text(content)
    assert holds.readers(step.parent) == {7: ["a reader"]}
    holds.remove_stale(step.parent, now=time.time() + 2 * holds.LIFETIME_S)
    assert [path.name for path in files(step)] == ["README", "step_7.0123.json"]
