"""``kempnerforge ckpt`` as a whole: bad paths, damage, and storage that fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.ckpt_cli import Ckpt, step_folder
from support.step_maker import flip_byte

from kempnerforge.cli import ckpt_inspect

pytest_plugins = ["support.ckpt_fixtures"]


# Bad paths


COMMANDS = ["ls", "explain", "du", "prune", "verify", "inspect", "pin", "unpin", "diff"]


def arguments_of(command: str, path: Path) -> list[object]:
    return {"pin": [path, 1], "unpin": [path, 1], "diff": [path, path]}.get(command, [path])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["missing", "file", "foreign", "circle"])
def test_ckpt_bad_path_status_2_names_it(ckpt: Ckpt, tmp_path: Path, command: str, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("x")
    elif kind == "foreign":
        (path / "sub").mkdir(parents=True)
    elif kind == "circle":
        path.symlink_to(path)
    done = ckpt(command, *arguments_of(command, path))
    assert done.status == 2, done
    assert str(path) in done.err
    assert done.out == ""


def test_ckpt_wrong_path_names_right_ones(ckpt: Ckpt, run: Path) -> None:
    done = ckpt("inspect", run)
    assert done.status == 2
    assert (
        f"is not the folder of one step: it has no manifest.json; steps in {run}/checkpoints: 40, 30"
        in done.err
    )
    done = ckpt("inspect", step_folder(run, 50))
    assert done.status == 2
    assert "step_00000050 does not exist; steps in" in done.err
    done = ckpt("ls", step_folder(run, 40))
    assert done.status == 2
    assert "is a single step; give the run's folder" in done.err
    done = ckpt("pin", run, 50)
    assert done.status == 2
    assert "has no committed step 50; committed: 40, 30, 20, 10" in done.err


@pytest.mark.parametrize("step", ["x", "-5", "1.5", "step_10", "9" * 30, ""])
def test_ckpt_pin_invalid_step_number_status_2(ckpt: Ckpt, run: Path, step: str) -> None:
    done = ckpt("pin", run, "--", step)
    assert done.status == 2
    assert "is not a step; write its number" in done.err


def test_ckpt_damaged_step_status_1(ckpt: Ckpt, run: Path) -> None:
    flip_byte(step_folder(run, 10) / "index.bin", 40)
    for command, path in (("inspect", [step_folder(run, 10)]), ("diff", [step_folder(run, 10)] * 2)):
        done = ckpt(command, *path)
        assert done.status == 1
        assert done.err.startswith("step_00000010 is damaged: index.bin has a wrong digest")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_ckpt_unreadable_folder_status_2(ckpt: Ckpt, run: Path) -> None:
    run.chmod(0)
    try:
        assert ckpt("ls", run).status == 2
    finally:
        run.chmod(0o755)


def test_ckpt_storage_error_reported_no_traceback(
    ckpt: Ckpt, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error", "x")

    monkeypatch.setattr(ckpt_inspect, "files_of", fail)
    done = ckpt("du", run)
    assert done.status == 1
    assert done.err.startswith("[Errno 5] Input/output error: 'x'")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_command_error_is_json_where_asked(ckpt: Ckpt, tmp_path: Path, options: list[str]) -> None:
    done = ckpt("ls", tmp_path / "gone", *options)
    assert done.status == 2
    assert "does not exist" in done.err
    if options:
        assert done.json == {"error": done.err.strip(), "status": 2}
    else:
        assert done.out == ""
