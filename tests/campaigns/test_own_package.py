"""A package outside KempnerForge that names its own model, optimizer, schedule, loss, data, hook and sink.

Its run is killed again and again, and must end with the bits of one that was not. The whole campaign
has 20 kills (``-m slow``); CI has a slice of it.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from support import own_package
from support.patch_target import patch_target
from support.run_files import tensor_digests
from support.runs import Launcher, Run

pytest_plugins = ["support.run_fixtures"]

UPDATE = patch_target("kempnerforge.train.step:TrainStepBase.update")
SEED = 20261130


def package_run(base: Path, steps: int) -> Run:
    base.mkdir()
    own_package.install(base)
    config = base / "config.toml"
    config.write_text(own_package.CONFIG.format(folder=base, steps=steps))
    folder = base / "run"
    return Run(folder=folder, checkpoints=folder / "checkpoints", base=base, config=config)


@pytest.mark.parametrize(("kills", "steps"), [(2, 14), pytest.param(20, 90, marks=pytest.mark.slow)])
def test_own_package_killed_again_and_again_is_bitwise(
    launcher: Launcher, tmp_path: Path, kills: int, steps: int
) -> None:
    whole = package_run(tmp_path / "whole", steps)
    launcher.finish(whole, ranks=2)
    run = package_run(tmp_path / "killed", steps)
    moments = random.Random(SEED)
    for _ in range(kills):
        kill = {"target": UPDATE, "call": moments.randint(4, 8), "rank": moments.randint(0, 1)}
        ended = launcher.run(run, ranks=2, faults=[("kill_at_call", kill)])
        assert -9 in ended.statuses, ended.output
    launcher.finish(run, ranks=2)
    assert len(run.receipts()) == kills + 1
    resumes = [receipt for receipt in run.receipts() if receipt["source"] == "resume"]
    assert resumes
    assert all(receipt["bitwise"] for receipt in resumes)
    assert run.counting() == whole.counting()
    assert tensor_digests(run.step_folder(steps)) == tensor_digests(whole.step_folder(steps))
    assert {int(line) for line in (run.base / "lines.txt").read_text().split()} >= set(range(1, steps + 1))


def test_own_package_starts_alike_on_any_number_of_ranks(launcher: Launcher, tmp_path: Path) -> None:
    digests = []
    for ranks in (1, 2, 4):
        run = package_run(tmp_path / str(ranks), 2)
        launcher.finish(run, "--checkpoint.save_first=true", ranks=ranks)
        found = tensor_digests(run.step_folder(0))
        digests.append({name: digest for name, digest in found.items() if name.startswith("model.")})
    assert digests[0] == digests[1] == digests[2]


TYPOS = {
    "--model.name=lab:Modle": 'lab has no Modle; did you mean "Model"?',
    "--model.args.layer=3": 'lab:Model has no argument layer; did you mean "layers"?',
    "--optimizer.name=lab-sgf": '"lab-sgf" is not a known optimizer; did you mean "lab-sgd"?',
    "--optimizer.args.momentun=0.5": 'has no argument momentun; did you mean "momentum"?',
    "--scheduler.args.periods=2": 'has no argument periods; did you mean "period"?',
    "--train.loss_args.smooth=0.1": 'has no argument smooth; did you mean "smoothing"?',
    "--data.dataset=lab:Walk": 'lab has no Walk; did you mean "Walks"?',
}


@pytest.mark.parametrize("override", TYPOS)
def test_own_package_typo_is_exit_2_at_check(launcher: Launcher, tmp_path: Path, override: str) -> None:
    run = package_run(tmp_path / "run", 4)
    ended = launcher.run(run, "config.toml", override, command=["config", "check"])
    assert ended.statuses == [2], ended.output
    assert TYPOS[override] in ended.output
    assert "Traceback" not in ended.output
    assert not run.folder.exists()


def test_own_package_entry_points_train(launcher: Launcher, tmp_path: Path) -> None:
    run = package_run(tmp_path / "run", 4)
    names = ["--model.name=lab-model", "--optimizer.name=lab-sgd"]
    launcher.finish(run, *names, ranks=2)
    assert run.committed()[0] == 4
